// Python face of csrc/door. Events wait here until the asyncio loop, which watches fileno(), takes them: the
// door's threads never need the GIL.
#include "door/door.h"

#include <pybind11/stl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>

#include "bindings.h"
#include "door/fields.h"
#include "door/handover.h"
#include "door_internal.h"
#include "stream/stream.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using door::CallRef;
using door::Event;
using door::EventKind;
using door::Metadata;
using door::Options;

class PyDoor final : private door::EventSink {
 public:
  explicit PyDoor(Options options)
      : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), door_(std::move(options), this) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~PyDoor() override {
    {
      const py::gil_scoped_release release;
      door_.Stop(0);
    }
    close(fd_);
  }

  door::Door& door() { return door_; }
  int fd() const { return fd_; }

  py::tuple Take() {
    uint64_t count = 0;
    // First: whoever puts something in after this wakes again.
    [[maybe_unused]] const ssize_t num_read = read(fd_, &count, sizeof count);
    door::Handover::Turn turn;
    const bool is_more = handover_.Take(&turn);
    py::list events;
    py::list plain;
    for (Event& event : turn.events) {
      if (!picker_ || !Pick(event, &events, &plain)) events.append(Show(event));
    }
    for (const auto& [path, num_calls] : turn.refused) {
      events.append(py::make_tuple(static_cast<int>(EventKind::kRefused), num_calls, path));
    }
    if (is_more) Wake();
    return py::make_tuple(std::move(events), std::move(plain));
  }

  py::list StopPicking() {
    py::list events;
    if (picker_) {
      for (Event& event : picker_->DropAll()) events.append(Show(event));
    }
    picker_.reset();
    return events;
  }

  void PickPlain(std::string path) { picker_.emplace(std::move(path), door_.options().write_ahead_bytes); }

 private:
  void Deliver(std::vector<Event>& events) override {
    if (handover_.Put(events)) Wake();
  }

  void Wake() {
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the fd is readable as it should be.
    [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
  }

  // Whether the event is dealt with.
  bool Pick(Event& event, py::list* events, py::list* plain) {
    if (event.kind == EventKind::kCall) return picker_->TakeCall(event);
    if (!picker_->Knows(event)) return false;
    if (event.kind != EventKind::kMessage) {
      Event begun = picker_->Drop(event);
      events->append(Show(begun));
      return false;
    }
    Event begun;
    py::object shown = picker_->TakeMessage(event, &begun);
    if (shown) {
      plain->append(std::move(shown));
      return true;
    }
    events->append(Show(begun));
    return false;
  }

  py::tuple Show(Event& event) {
    const auto kind = static_cast<int>(event.kind);
    const uint64_t id = event.call->id();
    switch (event.kind) {
      case EventKind::kCall:
        return py::make_tuple(kind, id, ShowCall(event.call, *event.info, door_.options().write_ahead_bytes));
      case EventKind::kMessage:
        return py::make_tuple(kind, id, py::bytes(event.bytes));
      default:
        return py::make_tuple(kind, id, event.bytes);
    }
  }

  const int fd_;
  door::Handover handover_;
  std::optional<PlainPicker> picker_;
  door::Door door_;  // last: its threads use the others
};

template <typename T>
bool Set(const py::kwargs& given, const char* name, T* field) {
  if (!given.contains(name)) return false;
  *field = py::cast<T>(given[name]);
  return true;
}

// A pair of message and details.
bool SetStatus(const py::kwargs& given, const char* name, door::OwnStatus* status) {
  std::pair<std::string, std::string> texts;
  if (!Set(given, name, &texts)) return false;
  *status = {std::move(texts.first), std::move(texts.second)};
  return true;
}

Options ReadOptions(const py::kwargs& given) {
  Options o;
  const int num_known =
      Set(given, "num_threads", &o.num_threads) + Set(given, "max_message_bytes", &o.max_message_bytes) +
      Set(given, "max_metadata_bytes", &o.max_metadata_bytes) + Set(given, "max_streams", &o.max_streams) +
      Set(given, "max_connections", &o.max_connections) +
      Set(given, "max_address_connections", &o.max_address_connections) +
      Set(given, "client_ipv6_prefix", &o.client_ipv6_prefix) + Set(given, "max_calls", &o.max_calls) +
      Set(given, "max_received_bytes", &o.max_received_bytes) +
      Set(given, "max_unsent_bytes", &o.max_unsent_bytes) +
      Set(given, "write_ahead_bytes", &o.write_ahead_bytes) + Set(given, "handshake_s", &o.handshake_s) +
      Set(given, "header_s", &o.header_s) + Set(given, "message_stall_s", &o.message_stall_s) +
      Set(given, "linger_s", &o.linger_s) + Set(given, "idle_s", &o.idle_s) +
      Set(given, "keepalive_s", &o.keepalive_s) + Set(given, "keepalive_timeout_s", &o.keepalive_timeout_s) +
      Set(given, "client_ping_s", &o.client_ping_s) + SetStatus(given, "overload", &o.overload) +
      SetStatus(given, "deadline", &o.deadline) + Set(given, "bounded_paths", &o.bounded_paths) +
      Set(given, "max_open", &o.max_open) + SetStatus(given, "full", &o.full);
  if (num_known != static_cast<int>(py::len(given))) throw py::type_error("Door has no such option");
  return o;
}

py::dict ShowTotals(const door::Totals& totals) {
  py::dict shown;
  shown["connections"] = totals.connections.load();
  shown["connections_accepted"] = totals.connections_accepted.load();
  shown["connections_refused"] = totals.connections_refused.load();
  shown["calls"] = totals.calls.load();
  shown["calls_started"] = totals.calls_started.load();
  shown["calls_succeeded"] = totals.calls_succeeded.load();
  shown["calls_failed"] = totals.calls_failed.load();
  shown["messages_sent"] = totals.messages_sent.load();
  shown["messages_received"] = totals.messages_received.load();
  shown["received_bytes"] = totals.received_bytes.load();
  return shown;
}

py::dict ShowConnection(uint64_t id, const door::ConnectionStats& stats) {
  py::dict shown;
  shown["id"] = id;
  shown["peer"] = stats.peer;
  shown["calls_started"] = stats.calls_started.load();
  shown["calls_succeeded"] = stats.calls_succeeded.load();
  shown["calls_failed"] = stats.calls_failed.load();
  shown["messages_sent"] = stats.messages_sent.load();
  shown["messages_received"] = stats.messages_received.load();
  shown["keepalives_sent"] = stats.keepalives_sent.load();
  return shown;
}

}  // namespace

Metadata ReadMetadata(const py::iterable& entries) {
  Metadata metadata;
  for (const py::handle item : entries) {
    const auto pair = py::reinterpret_borrow<py::sequence>(item);
    if (py::len(pair) != 2) throw py::value_error("metadata must be pairs of key and value");
    door::MetadataEntry entry{py::cast<std::string>(pair[0]), py::cast<std::string>(pair[1])};
    if (!door::IsSendable(entry)) {
      throw py::value_error("metadata " + py::cast<std::string>(py::repr(pair[0])) +
                            " has a key or a value that gRPC does not allow");
    }
    metadata.push_back(std::move(entry));
  }
  return metadata;
}

py::tuple ShowMetadata(const Metadata& metadata) {
  py::tuple shown(metadata.size());
  for (size_t i = 0; i < metadata.size(); ++i) {
    const auto& [key, value] = metadata[i];
    const py::object shown_value =
        key.ends_with("-bin") ? py::object(py::bytes(value)) : py::object(py::str(value));
    shown[i] = py::make_tuple(key, shown_value);
  }
  return shown;
}

py::object ShowTimeout(const door::CallInfo& info) {
  if (info.timeout_ns < 0) return py::none();
  return py::float_(static_cast<double>(info.timeout_ns) / 1e9);
}

py::tuple ShowCall(const CallRef& call, const door::CallInfo& info, size_t write_ahead_bytes) {
  return py::make_tuple(PyCall{call, write_ahead_bytes}, info.path, info.peer, ShowMetadata(info.metadata),
                        ShowTimeout(info), info.accepts_gzip);
}

const std::shared_ptr<door::StreamCarrier>& CarrierFor(size_t write_ahead_bytes) {
  static std::mutex mutex;
  static std::map<size_t, std::shared_ptr<door::StreamCarrier>> carriers;
  const std::lock_guard lock(mutex);
  std::shared_ptr<door::StreamCarrier>& carrier = carriers[write_ahead_bytes];
  if (!carrier) carrier = std::make_shared<door::StreamCarrier>(write_ahead_bytes);
  return carrier;
}

void BindDoor(py::module_& module) {
  py::class_<PyCall>(module, "DoorCall", "A handle to a client's call; without effect once the call is over.")
      .def_property_readonly("is_over", [](const PyCall& self) { return self.call->is_over(); })
      .def("send_headers",
           [](const PyCall& self, const py::iterable& metadata) {
             Metadata headers = ReadMetadata(metadata);
             if (door::MetadataBytes(headers) > door::kMaxMetadataBytes) {
               throw py::value_error("the initial metadata has more than " +
                                     std::to_string(door::kMaxMetadataBytes) + " bytes");
             }
             door::SendHeaders(self.call, std::move(headers));
           })
      .def(
          "write",
          [](const PyCall& self, const py::bytes& message) {
            door::Write(self.call, std::string_view(message));
            return self.call->AwaitRoom(self.write_ahead_bytes);
          },
          "Send a message. True: so much is unsent that the writer should wait for the room event, which "
          "comes.")
      .def("finish",
           [](const PyCall& self, int code, const std::string& message, const py::iterable& metadata) {
             door::Finish(self.call, {code, message, ReadMetadata(metadata)});
           })
      .def("reset", [](const PyCall& self) { door::Reset(self.call); })
      .def(
          "carry",
          [](const PyCall& self, stream::Stream& stream) {
            stream.Attach(CarrierFor(self.write_ahead_bytes), self.call);
          },
          py::arg("stream"), "Send what steps put into the stream, whenever it is awaited; see Stream.")
      .def("acknowledge", [](const PyCall& self, size_t bytes) { door::Acknowledge(self.call, bytes); })
      .def("compress", [](const PyCall& self) { door::CompressAnswers(self.call); });

  py::class_<PyDoor>(module, "Door", "A gRPC server; keyword arguments as csrc/door/options.h has them.")
      .def(py::init([](const py::kwargs& options) { return std::make_unique<PyDoor>(ReadOptions(options)); }))
      .def(
          "listen",
          [](PyDoor& self, const std::string& host, int port, bool use_tls) {
            try {
              self.door().Listen(host, &port, use_tls);
            } catch (const std::runtime_error& error) {
              PyErr_SetString(PyExc_OSError, error.what());
              throw py::error_already_set();
            }
            return port;
          },
          "Listen, and give the port. Raises OSError.")
      .def(
          "use_tls",
          [](PyDoor& self, const py::bytes& certificate, const py::bytes& key, const py::bytes& client_ca) {
            self.door().UseTls({certificate, key, client_ca});
          },
          "Use these PEM texts for new connections. Raises ValueError and changes nothing if they are unfit.")
      .def("start", [](PyDoor& self) { self.door().Start(); })
      .def_property_readonly("has_ring", [](PyDoor& self) { return self.door().has_ring(); })
      .def("fileno", &PyDoor::fd)
      .def("take", &PyDoor::Take,
           "The events that came: (kind, call id, payload). 0: a call, (DoorCall, path, peer, metadata, "
           "timeout in s or None, accepts gzip); 1: a message; 2: half-closed; 3: cancelled, why; 4: room; "
           "5: calls were refused by bounded_paths, their path, and in the call id's place their number. And "
           "the calls that pick_plain picked: they began before the events beside them. If there are many, "
           "the rest stays for the next call, and fileno() readable.")
      .def("pick_plain", &PyDoor::PickPlain, py::arg("path"))
      .def("stop_picking", &PyDoor::StopPicking)
      .def("hold", [](PyDoor& self) { self.door().Hold(); })
      .def("let_go", [](PyDoor& self) { self.door().LetGo(); })
      .def("drain", [](PyDoor& self) { self.door().Drain(); })
      .def(
          "stop", [](PyDoor& self, double grace_s) { self.door().Stop(grace_s); },
          py::call_guard<py::gil_scoped_release>())
      .def("totals", [](PyDoor& self) { return ShowTotals(self.door().totals()); })
      .def("connections", [](PyDoor& self) {
        py::list shown;
        for (const auto& [id, stats] : self.door().connections()) shown.append(ShowConnection(id, *stats));
        return shown;
      });
  BindDoorPlain(module);
}

}  // namespace twinjet::bindings
