// What the binding files of csrc/door share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "door/call.h"
#include "door/carrier.h"
#include "requests/plain_generate.h"

namespace twinjet::bindings {

// A call of a client, to be answered from Python.
struct PyCall {
  door::CallRef call;
  size_t write_ahead_bytes;
};

// As grpc.aio has it: pairs, binary values as bytes. Raises ValueError for what gRPC does not allow.
door::Metadata ReadMetadata(const pybind11::iterable& entries);
pybind11::tuple ShowMetadata(const door::Metadata& metadata);
// In s; None for no timeout.
pybind11::object ShowTimeout(const door::CallInfo& info);
// (DoorCall, path, peer, metadata, timeout in s or None, accepts gzip).
pybind11::tuple ShowCall(const door::CallRef& call, const door::CallInfo& info, size_t write_ahead_bytes);
const std::shared_ptr<door::StreamCarrier>& CarrierFor(size_t write_ahead_bytes);

// Picks the calls of one method whose requests are plain out of a door's events, so that they need not go
// through Python one by one. Under the interpreter's lock.
class PlainPicker {
 public:
  PlainPicker(std::string path, size_t write_ahead_bytes)
      : path_(std::move(path)), write_ahead_bytes_(write_ahead_bytes) {}

  // Whether the call may be plain; then it is kept until its message comes.
  bool TakeCall(door::Event& event);
  // Whether the event is one of a call that is kept.
  bool Knows(const door::Event& event) const;
  // A message of a call that is kept, which is not kept any more: what plain() gives Python of it, or null if
  // it is not plain; then *call is the event of its beginning.
  pybind11::object TakeMessage(door::Event& event, door::Event* call);
  // The same for a call that ends without a message.
  door::Event Drop(const door::Event& event);
  // The beginnings of all calls that are kept.
  std::vector<door::Event> DropAll();

 private:
  const std::string path_;
  const size_t write_ahead_bytes_;
  std::unordered_map<uint64_t, door::Event> waiting_;
  requests::Lots lots_;
  // The last ones made: most calls have the same.
  std::string last_model_, last_sampling_;
  pybind11::object shown_model_, shown_sampling_;
};

void BindDoorPlain(pybind11::module_& module);

}  // namespace twinjet::bindings
