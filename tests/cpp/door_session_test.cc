// One connection between the door's session and nghttp2's client, bytes moved by hand and time set by hand.
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "check.h"
#include "door/session.h"
#include "door_client.h"

using namespace twinjet::door;
using test::Fields;

namespace {

constexpr int64_t kSecond = 1'000'000'000;

struct Rig {
  explicit Rig(Options given = {}, bool does_read = true, uint32_t window = 65535)
      : options(std::move(given)), client(does_read, window) {
    state.options = &options;
    state.totals = std::make_shared<Totals>();
    state.mailbox = std::make_shared<Mailbox>();
    state.now_ns = 100 * kSecond;
    session = std::make_unique<Session>(&state, std::make_shared<ConnectionStats>("ipv4:10.0.0.1:1"),
                                        std::make_shared<Client>());
  }

  // Moves bytes both ways until there are none.
  void Pump() {
    while (true) {
      const std::string up = client.Pull();
      if (!up.empty()) is_fed = session->Feed(up);
      std::string down;
      session->Pull(&down, 1 << 20);
      if (!down.empty()) client.Feed(down);
      if (up.empty() && down.empty()) return;
    }
  }
  // Begins a call of a message of so many bytes, and sends the first of them; the call's number.
  int32_t Offer(size_t size, size_t num_sent) {
    const int32_t id = client.Begin("/a/b");
    client.SendRaw(id, test::Framed(std::string(size, 'x')).substr(0, num_sent));
    return id;
  }
  // What the door sends to hostile bytes.
  std::string Attack(std::string_view bytes) {
    is_fed = session->Feed(bytes);
    std::string down;
    session->Pull(&down, 1 << 20);
    return down;
  }
  void Later(double seconds) {
    state.now_ns += static_cast<int64_t>(seconds * 1e9);
    while (!state.timers.empty() && state.timers.begin()->at_ns <= state.now_ns) {
      Stream* stream = state.timers.begin()->stream;
      state.timers.erase(state.timers.begin());
      stream->session->OnTimer(stream);
    }
    is_alive = session->Tick();
    Pump();
  }
  void Do(CommandKind kind, const CallRef& call, size_t size = 0, Metadata headers = {}, Status status = {}) {
    Command command{kind,
                    call,
                    0,
                    size,
                    std::make_unique<Metadata>(std::move(headers)),
                    std::make_unique<Status>(std::move(status))};
    if (call->is_over()) return;
    session->Apply(command, {});
  }
  void Write(const CallRef& call, std::string_view message) {
    call->CountUnsent(message.size());
    Mail mail;
    mail.bytes = message;
    Command command{CommandKind::kMessage, call, 0, message.size(), nullptr, nullptr};
    session->Apply(command, mail);
  }
  void Finish(const CallRef& call, Status status = {}) {
    Do(CommandKind::kFinish, call, 0, {}, std::move(status));
  }

  std::vector<Event> Take() { return std::exchange(state.events, {}); }
  // The one new call among the events that came.
  CallRef TakeCall() {
    Pump();
    CallRef found;
    for (Event& event : Take()) {
      if (event.kind != EventKind::kCall) continue;
      CHECK(!found);
      found = event.call;
      info = std::move(event.info);
    }
    CHECK(found != nullptr);
    return found;
  }
  size_t Count(EventKind kind) {
    return static_cast<size_t>(std::count_if(state.events.begin(), state.events.end(),
                                             [kind](const Event& event) { return event.kind == kind; }));
  }

  Options options;
  LoopState state;
  std::unique_ptr<Session> session;
  test::Http2Client client;
  std::unique_ptr<CallInfo> info;
  bool is_fed = true;
  bool is_alive = true;
};

std::string Text(const test::Http2Client::Goaway& goaway) { return goaway.text; }

}  // namespace

TEST(held_mail_wakes_nobody_until_it_is_let_go) {
  const auto mailbox = std::make_shared<Mailbox>();
  const int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{EPOLLIN | EPOLLET, {}};
  CHECK_EQ(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, mailbox->fd(), &event), 0);
  const auto is_awake = [&] { return epoll_wait(epoll_fd, &event, 1, 0) == 1; };
  const auto call = std::make_shared<Call>(1, mailbox, std::make_shared<Totals>(), std::make_shared<Client>(),
                                           std::make_shared<std::atomic<int64_t>>(0));
  mailbox->Hold();
  mailbox->PostMessage(call, "one");
  mailbox->Post({CommandKind::kAck, call, 0, 0, nullptr, nullptr});
  CHECK(!is_awake());
  mailbox->LetGo();
  CHECK(is_awake());
  Mail mail;
  mailbox->Take(&mail);
  CHECK_EQ(mail.commands.size(), 2u);
  CHECK(!is_awake());
  mailbox->Hold();
  mailbox->LetGo();
  CHECK(!is_awake());
  mailbox->Hold();
  mailbox->PostMessage(call, "held");
  CHECK(!is_awake());
  std::thread([&] { mailbox->PostMessage(call, "another thread's"); }).join();
  CHECK(is_awake());
  mailbox->LetGo();
  CHECK(!is_awake());
  mail.Clear();
  mailbox->Take(&mail);
  CHECK_EQ(mail.commands.size(), 2u);
  mailbox->PostMessage(call, "two");
  CHECK(is_awake());
  mail.Clear();
  mailbox->Take(&mail);
  mailbox->PostMessage(call, "three");
  CHECK(is_awake());
  // What lies there holds the call, and the call the mailbox.
  mailbox->Close();
  close(epoll_fd);
}

TEST(a_unary_call_comes_with_its_message_and_gets_its_answer) {
  Rig rig;
  const int32_t id =
      rig.client.Ask("/pkg.Service/Method", "question", {{"grpc-timeout", "5S"}, {"x-a", "b"}});
  rig.Pump();
  std::vector<Event> events = rig.Take();
  CHECK_EQ(events.size(), 3u);
  CHECK(events[0].kind == EventKind::kCall);
  CHECK_EQ(events[0].info->path, "/pkg.Service/Method");
  CHECK_EQ(events[0].info->peer, "ipv4:10.0.0.1:1");
  CHECK_EQ(events[0].info->timeout_ns, 5 * kSecond);
  CHECK_EQ(events[0].info->metadata.size(), 1u);
  CHECK_EQ(events[0].info->metadata[0].key, "x-a");
  CHECK(events[1].kind == EventKind::kMessage);
  CHECK_EQ(events[1].bytes, "question");
  CHECK(events[2].kind == EventKind::kHalfClosed);
  rig.Write(events[0].call, "answer");
  rig.Finish(events[0].call);
  rig.Pump();
  const test::Answer& answer = rig.client.answer(id);
  CHECK_EQ(answer.messages().size(), 1u);
  CHECK_EQ(answer.messages()[0], "answer");
  CHECK_EQ(answer.headers[0].second, "200");
  CHECK_EQ(answer.Find("content-type"), "application/grpc");
  CHECK_EQ(answer.status(), 0);
  CHECK(answer.is_closed);
  CHECK_EQ(answer.error_code, 0u);
  CHECK(events[0].call->is_over());
  CHECK_EQ(rig.Take().size(), 0u);
}

TEST(a_failure_without_headers_is_one_block) {
  Rig rig;
  const int32_t id = rig.client.Ask("/a/b", "");
  const CallRef call = rig.TakeCall();
  rig.Finish(call, {kInvalidArgument, "caf\xc3\xa9: 100%", {{"grpc-status-details-bin", {"\0\xff\x01", 3}}}});
  rig.Pump();
  const test::Answer& answer = rig.client.answer(id);
  CHECK(answer.trailers.empty());
  CHECK_EQ(answer.status(), kInvalidArgument);
  CHECK_EQ(answer.Find("grpc-message"), "caf%C3%A9: 100%25");
  CHECK_EQ(*Base64Decode(answer.Find("grpc-status-details-bin")), std::string("\0\xff\x01", 3));
  CHECK(answer.is_closed);
}

TEST(metadata_goes_both_ways_with_binary_values) {
  Rig rig;
  const std::string bytes("\0\x01\xfe\xff,", 5);
  const std::string text = Base64Encode(bytes);
  const int32_t id = rig.client.Ask("/a/b", "", {{"k-bin", text + "," + text}, {"k", "v"}, {"k", "w"}});
  const CallRef call = rig.TakeCall();
  CHECK_EQ(rig.info->metadata.size(), 4u);
  CHECK_EQ(rig.info->metadata[0].value, bytes);
  CHECK_EQ(rig.info->metadata[1].value, bytes);
  CHECK_EQ(rig.info->metadata[3].value, "w");
  rig.Do(CommandKind::kHeaders, call, 0, {{"initial", "1"}, {"initial-bin", bytes}});
  rig.Finish(call, {0, "", {{"trailing-bin", bytes}, {"trailing", "2"}}});
  rig.Pump();
  const test::Answer& answer = rig.client.answer(id);
  CHECK_EQ(*Base64Decode(answer.Find("initial-bin")), bytes);
  CHECK_EQ(*Base64Decode(answer.Find("trailing-bin")), bytes);
  CHECK_EQ(answer.Find("trailing"), "2");
  CHECK_EQ(answer.status(), 0);
  CHECK(answer.data.empty());
}

TEST(metadata_that_grpc_does_not_allow_is_refused_by_us) {
  for (const Fields& more : {Fields{{"k-bin", "not base64!"}}, Fields{{"k", "\x80"}}, Fields{{"k!", "v"}}}) {
    Rig rig;
    const int32_t id = rig.client.Ask("/a/b", "", more);
    rig.Pump();
    CHECK_EQ(rig.client.answer(id).status(), kInvalidArgument);
    CHECK_EQ(rig.Take().size(), 0u);
  }
}

TEST(messages_stream_both_ways_until_the_client_half_closes) {
  Rig rig;
  const int32_t id = rig.client.Begin("/a/b");
  const CallRef call = rig.TakeCall();
  const int64_t num_of_metadata = rig.state.totals->received_bytes;
  for (int i = 0; i < 50; ++i) {
    rig.client.Send(id, "ping" + std::to_string(i));
    rig.Pump();
    std::vector<Event> events = rig.Take();
    CHECK_EQ(events.size(), 1u);
    CHECK_EQ(events[0].bytes, "ping" + std::to_string(i));
    rig.Do(CommandKind::kAck, call, events[0].bytes.size());
    rig.Write(call, "pong");
    rig.Pump();
    CHECK_EQ(rig.client.answer(id).messages().size(), static_cast<size_t>(i + 1));
  }
  rig.client.HalfClose(id);
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kHalfClosed), 1u);
  rig.Finish(call);
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), 0);
  CHECK_EQ(rig.state.totals->received_bytes.load(), num_of_metadata);
}

TEST(an_answer_before_the_request_has_ended_stops_the_client) {
  Rig rig;
  const int32_t id = rig.client.Begin("/a/b");
  const CallRef call = rig.TakeCall();
  rig.Finish(call, {kInvalidArgument, "no", {}});
  rig.Pump();
  CHECK(rig.client.answer(id).is_closed);
  CHECK_EQ(rig.client.answer(id).error_code, static_cast<uint32_t>(NGHTTP2_NO_ERROR));
  CHECK_EQ(rig.client.answer(id).status(), kInvalidArgument);
}

// Whenever the door ends a call, its client gets the status, whole, and is told with NO_ERROR to send no
// more.
TEST(the_status_arrives_however_far_the_request_has_come) {
  const std::string message(40'000, 'm');
  const std::string framed = test::Framed(message);
  const std::vector<std::string> pieces = {
      "", framed.substr(0, 3), framed.substr(3, 20'000), framed.substr(20'003), framed, ""};
  enum class End { kFinish, kFinishAfterMessages, kDeadline, kTooLarge };
  for (const End end : {End::kFinish, End::kFinishAfterMessages, End::kDeadline, End::kTooLarge}) {
    for (size_t when = 0; when <= pieces.size(); ++when) {
      const bool is_between_messages = when < 2 || when == 4 || when == 5;
      if (end == End::kTooLarge && !is_between_messages) continue;
      // Pumped: what was sent has arrived. Not: it is on its way while the call ends.
      for (const bool is_pumped : {true, false}) {
        Options options;
        options.deadline = {"too late", "details"};
        options.max_message_bytes = 50'000;
        Rig rig(options);
        const int32_t id = rig.client.Begin("/a/b", {{"grpc-timeout", "9S"}});
        const CallRef call = rig.TakeCall();
        for (size_t i = 0; i < when; ++i) {
          rig.client.SendRaw(id, pieces[i]);
          if (i + 1 == pieces.size()) rig.client.HalfClose(id);
          if (is_pumped) rig.Pump();
        }
        int expected = kResourceExhausted;
        if (end == End::kDeadline) {
          expected = kDeadlineExceeded;
          rig.Later(9);
        } else if (end == End::kTooLarge) {
          rig.client.SendRaw(id, test::Framed(std::string(60'000, 'x')));
          rig.Pump();
        } else {
          if (end == End::kFinishAfterMessages) rig.Write(call, "answer");
          rig.Finish(call, {kResourceExhausted, "no", {{"grpc-status-details-bin", "details"}}});
        }
        rig.client.SendRaw(id, framed);
        rig.client.HalfClose(id);
        rig.Pump();
        const test::Answer& answer = rig.client.answer(id);
        CHECK_EQ(answer.status(), expected);
        CHECK(answer.is_closed);
        CHECK_EQ(answer.error_code, static_cast<uint32_t>(NGHTTP2_NO_ERROR));
        CHECK_EQ(answer.messages().size(), end == End::kFinishAfterMessages ? 1u : 0u);
        if (end != End::kTooLarge) CHECK_EQ(*Base64Decode(answer.Find("grpc-status-details-bin")), "details");
      }
    }
  }
}

TEST(a_status_is_sent_however_long_its_message) {
  Rig rig;
  std::string text;
  while (text.size() < 100'000) text += "\u00e9\u4e16%";  // three to nine bytes each when encoded
  const int32_t id = rig.client.Ask("/a/b", "question");
  const CallRef call = rig.TakeCall();
  rig.Finish(call, {kInternal, text, {{"k", std::string(31'000, 'v')}}});
  rig.Pump();
  const test::Answer& answer = rig.client.answer(id);
  CHECK_EQ(answer.status(), kInternal);
  CHECK(answer.Find("grpc-message").size() > 16'000);
  CHECK(text.starts_with(answer.message()));
  const size_t num_left = answer.message().size() % 6;  // of a six-byte group of three characters
  CHECK(num_left == 0 || num_left == 2 || num_left == 5);
  CHECK_EQ(answer.Find("k").size(), 31'000u);
}

TEST(gzip_goes_both_ways) {
  Rig rig;
  const std::string text(10000, 'z');
  const int32_t id =
      rig.client.Begin("/a/b", {{"grpc-encoding", "gzip"}, {"grpc-accept-encoding", "identity,gzip"}});
  rig.client.SendRaw(id, test::Framed(Gzip(text), true));
  rig.client.SendRaw(id, test::Framed("plain"));
  rig.Pump();
  std::vector<Event> events = rig.Take();
  CHECK(events[0].info->accepts_gzip);
  CHECK_EQ(events[1].bytes, text);
  CHECK_EQ(events[2].bytes, "plain");
  rig.Do(CommandKind::kCompress, events[0].call);
  rig.Write(events[0].call, text);
  rig.Finish(events[0].call);
  rig.Pump();
  const test::Answer& answer = rig.client.answer(id);
  CHECK_EQ(answer.Find("grpc-encoding"), "gzip");
  CHECK(answer.data.size() < 200);
  CHECK_EQ(answer.messages()[0], text);
  CHECK_EQ(events[0].call->unsent_bytes(), 0);
}

TEST(requests_that_are_not_grpc_get_an_answer) {
  struct Case {
    Fields base;
    std::string http_status;
    int status;
  };
  const Fields post = {{":method", "POST"}, {":scheme", "http"}, {":path", "/a/b"}, {":authority", "x"}};
  Fields get = post;
  get[0].second = "GET";
  Fields json = post;
  json.emplace_back("content-type", "application/json");
  Fields encoded = post;
  encoded.insert(encoded.end(), {{"content-type", "application/grpc+proto"}, {"grpc-encoding", "br"}});
  Fields timeout = post;
  timeout.insert(timeout.end(), {{"content-type", "application/grpc"}, {"grpc-timeout", "soon"}});
  for (const Case& one : {Case{get, "405", kUnimplemented}, Case{json, "415", kInvalidArgument},
                          Case{post, "415", kInvalidArgument}, Case{encoded, "200", kUnimplemented},
                          Case{timeout, "200", kInvalidArgument}}) {
    Rig rig;
    const int32_t id = rig.client.Begin("", {}, one.base);
    rig.Pump();
    CHECK_EQ(rig.client.answer(id).headers[0].second, one.http_status);
    CHECK_EQ(rig.client.answer(id).status(), one.status);
    CHECK(!rig.client.answer(id).message().empty());
    CHECK_EQ(rig.Take().size(), 0u);
  }
}

TEST(http1_is_answered_with_a_sentence) {
  Rig rig;
  CHECK_EQ(rig.Attack("P"), "");
  const std::string answer = rig.Attack("OST / HTTP/1.1\r\nHost: x\r\n\r\n");
  CHECK(answer.starts_with("HTTP/1.1 505 "));
  CHECK(answer.find("gRPC") != std::string::npos);
  CHECK(rig.session->is_done());
  Rig other;
  CHECK_EQ(other.Attack("GET / HTTP/1.0"), answer);
  Rig binary;
  CHECK_EQ(binary.Attack("\x16\x03\x01"), "");
  CHECK(binary.session->is_done());
}

TEST(a_reset_by_the_client_is_told_once_and_last) {
  Rig rig;
  const int32_t id = rig.client.Ask("/a/b", "x");
  const CallRef call = rig.TakeCall();
  rig.client.Cancel(id);
  rig.Pump();
  std::vector<Event> events = rig.Take();
  CHECK_EQ(events.size(), 1u);
  CHECK(events[0].kind == EventKind::kCancelled);
  CHECK(call->is_over());
}

TEST(a_lost_connection_cancels_its_calls) {
  Rig rig;
  rig.client.Ask("/a/b", "x");
  rig.client.Begin("/a/c");
  rig.Pump();
  rig.Take();
  rig.session.reset();
  CHECK_EQ(rig.Count(EventKind::kCancelled), 2u);
  rig.Take();
  CHECK_EQ(rig.state.totals->calls.load(), 0);
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
  CHECK(rig.state.timers.empty());
}

TEST(a_deadline_ends_the_call) {
  Rig rig;
  const int32_t id = rig.client.Ask("/a/b", "x", {{"grpc-timeout", "200m"}});
  const CallRef call = rig.TakeCall();
  rig.Later(0.1);
  CHECK_EQ(rig.Take().size(), 0u);
  rig.Later(0.11);
  CHECK_EQ(rig.Count(EventKind::kCancelled), 1u);
  CHECK_EQ(rig.client.answer(id).status(), kDeadlineExceeded);
  rig.Finish(call);
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), kDeadlineExceeded);
}

TEST(a_deadline_comes_after_what_was_written) {
  Rig rig;
  const int32_t id = rig.client.Ask("/a/b", "x", {{"grpc-timeout", "200m"}});
  const CallRef call = rig.TakeCall();
  rig.Write(call, "written in the same turn");
  rig.Later(0.3);
  CHECK_EQ(rig.client.answer(id).status(), kDeadlineExceeded);
  CHECK_EQ(rig.client.answer(id).messages().size(), 1u);
  CHECK_EQ(rig.client.answer(id).error_code, 0u);
}

TEST(a_reader_that_stops_holds_no_more_than_it_may) {
  Options options;
  options.max_unsent_bytes = 200'000;
  Rig rig(options, false);
  const int32_t id = rig.client.Ask("/a/b", "x");
  const CallRef call = rig.TakeCall();
  CHECK(!call->AwaitRoom(options.write_ahead_bytes));
  const std::string message(10'000, 'm');
  for (int i = 0; i < 7; ++i) rig.Write(call, message);
  rig.Pump();
  // The client's window is 65,535 bytes.
  CHECK_EQ(call->unsent_bytes(), 7 * 10'005 - 65'535);
  for (int i = 0; i < 3; ++i) rig.Write(call, message);
  CHECK(call->AwaitRoom(options.write_ahead_bytes));
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kRoom), 0u);
  rig.client.GiveWindow(id, 30'000);
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kRoom), 1u);
  for (int i = 0; i < 40 && !call->is_over(); ++i) rig.Write(call, message);
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kCancelled), 1u);
  CHECK(call->is_over());
  CHECK_EQ(call->unsent_bytes(), 0);
  CHECK_EQ(rig.client.answer(id).error_code, static_cast<uint32_t>(NGHTTP2_ENHANCE_YOUR_CALM));
}

TEST(a_finished_call_that_nobody_reads_is_dropped) {
  Options options;
  options.linger_s = 5;
  Rig rig(options, false);
  rig.client.Ask("/a/b", "x");
  const CallRef call = rig.TakeCall();
  rig.Write(call, std::string(100'000, 'm'));
  rig.Finish(call);
  rig.Pump();
  rig.Later(4.9);
  CHECK(!call->is_over());
  rig.Later(0.2);
  CHECK(call->is_over());
}

TEST(large_answers_take_turns) {
  Rig rig({}, true, 1 << 20);
  const int32_t first = rig.client.Ask("/a/b", "x");
  const CallRef one = rig.TakeCall();
  const int32_t second = rig.client.Ask("/a/b", "x");
  const CallRef other = rig.TakeCall();
  rig.Write(one, std::string(500'000, '1'));
  rig.Write(other, std::string(500'000, '2'));
  std::string down;
  rig.session->Pull(&down, 60'000);
  rig.client.Feed(down);
  CHECK(rig.client.answer(first).data.size() > 15'000);
  CHECK(rig.client.answer(second).data.size() > 15'000);
}

TEST(a_client_cannot_send_ahead_of_a_handler) {
  Options options;
  options.stream_window_bytes = 70'000;
  Rig rig(options);
  const int32_t id = rig.client.Begin("/a/b");
  const CallRef call = rig.TakeCall();
  const int64_t num_of_metadata = rig.state.totals->received_bytes;
  for (int i = 0; i < 100; ++i) rig.client.Send(id, std::string(10'000, 'm'));
  rig.Pump();
  const size_t num_ahead = rig.Count(EventKind::kMessage);
  CHECK(num_ahead <= 7);
  size_t num_taken = 0;
  while (num_taken < 100) {
    std::vector<Event> events = rig.Take();
    CHECK(!events.empty());
    for (Event& event : events) {
      ++num_taken;
      rig.Do(CommandKind::kAck, call, event.bytes.size());
    }
    rig.Pump();
  }
  CHECK_EQ(rig.state.totals->received_bytes.load(), num_of_metadata);
}

TEST(messages_beyond_the_limit_are_refused) {
  Options options;
  options.max_message_bytes = 1000;
  Rig rig(options);
  const int32_t fits = rig.client.Ask("/a/b", std::string(1000, 'x'));
  rig.Finish(rig.TakeCall());
  const int32_t large = rig.client.Ask("/a/b", std::string(1001, 'x'));
  const int32_t bomb = rig.client.Begin("/a/b", {{"grpc-encoding", "gzip"}});
  rig.client.SendRaw(bomb, test::Framed(Gzip(std::string(1 << 20, 'x')), true));
  rig.Pump();
  CHECK_EQ(rig.client.answer(fits).status(), 0);
  CHECK_EQ(rig.client.answer(large).status(), kResourceExhausted);
  CHECK(rig.client.answer(large).message().find("1001 bytes; allowed: 1000") != std::string::npos);
  CHECK_EQ(rig.client.answer(bomb).status(), kResourceExhausted);
  CHECK_EQ(rig.Count(EventKind::kCancelled), 2u);
}

TEST(calls_of_bounded_paths_are_refused_before_handlers_hear_of_them) {
  Options options;
  options.bounded_paths = {"/a/Stream", "/a/Other"};
  options.max_open = 2;
  options.full = {"no more than 2", "details"};
  Rig rig(options);
  const int32_t first = rig.client.Ask("/a/Stream", "x");
  const CallRef call = rig.TakeCall();
  const int32_t second = rig.client.Ask("/a/Other", "x");
  rig.TakeCall();
  const int32_t third = rig.client.Ask("/a/Stream", "x");
  rig.Pump();
  CHECK_EQ(rig.client.answer(third).status(), kResourceExhausted);
  CHECK_EQ(rig.client.answer(third).message(), "no more than 2");
  CHECK_EQ(*Base64Decode(rig.client.answer(third).Find("grpc-status-details-bin")), "details");
  std::vector<Event> events = rig.Take();
  CHECK_EQ(events.size(), 1u);
  CHECK(events[0].kind == EventKind::kRefused);
  CHECK_EQ(events[0].bytes, "/a/Stream");
  rig.client.Ask("/a/b", "x");
  rig.Finish(rig.TakeCall());
  CHECK_EQ(rig.state.totals->open.load(), 2);
  // A place is free as soon as its call has a status or is cancelled, whoever still holds the call.
  rig.Finish(call);
  rig.client.Cancel(second);
  rig.Pump();
  rig.Take();
  CHECK_EQ(rig.client.answer(first).status(), kOk);
  CHECK_EQ(rig.state.totals->open.load(), 0);
}

TEST(a_call_of_a_bounded_path_takes_no_place_before_it_asks) {
  Options options;
  options.bounded_paths = {"/a/Stream"};
  options.max_open = 2;
  Rig rig(options);
  std::vector<int32_t> silent;
  for (int i = 0; i < 10; ++i) silent.push_back(rig.client.Begin("/a/Stream"));
  rig.client.SendRaw(silent[0], test::Framed("half").substr(0, 7));
  rig.Pump();
  CHECK_EQ(rig.Take().size(), 0u);
  CHECK_EQ(rig.state.totals->open.load(), 0);
  rig.client.Ask("/a/Stream", "x");
  rig.Finish(rig.TakeCall());
  rig.client.Cancel(silent[1]);
  rig.Pump();
  CHECK_EQ(rig.Take().size(), 0u);
  // A server that ends tells all of them so.
  rig.session->Drain();
  std::vector<Event> events = rig.Take();
  CHECK_EQ(std::ranges::count(events, EventKind::kCall, &Event::kind), 2);
  CHECK_EQ(std::ranges::count(events, EventKind::kRefused, &Event::kind), 7);
}

TEST(request_bytes_of_all_calls_together_are_bounded) {
  Options options;
  options.max_received_bytes = 100'000;
  options.overload = {"too much", "details"};
  Rig rig(options);
  std::vector<int32_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(rig.Offer(20'000, 10'000));
  rig.Pump();
  CHECK(rig.state.totals->received_bytes <= 110'000);
  CHECK_EQ(rig.client.answer(ids.back()).status(), kResourceExhausted);
  CHECK_EQ(*Base64Decode(rig.client.answer(ids.back()).Find("grpc-status-details-bin")), "details");
  for (int32_t id : ids) rig.client.Cancel(id);
  rig.Pump();
  rig.Take();
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
}

TEST(large_requests_leave_room_for_short_ones) {
  Options options;
  options.max_received_bytes = 900'000;
  Rig rig(options);
  std::vector<int32_t> ids;
  for (int i = 0; i < 6; ++i) {
    ids.push_back(rig.Offer(300'000, 200'000));
    rig.Pump();
  }
  CHECK(rig.state.totals->received_bytes <= 820'000);
  CHECK_EQ(rig.client.answer(ids.front()).status(), -1);
  CHECK_EQ(rig.client.answer(ids.back()).status(), kResourceExhausted);
  rig.Take();
  const int32_t short_id = rig.client.Ask("/a/b", std::string(40'000, 'x'));
  const CallRef call = rig.TakeCall();
  rig.Finish(call);
  rig.Pump();
  CHECK_EQ(rig.client.answer(short_id).status(), 0);
}

TEST(one_clients_requests_leave_room_for_those_of_others) {
  Options options;
  options.max_received_bytes = 900'000;
  Rig rig(options);
  Rig other(options);
  other.state.totals = rig.state.totals;
  const auto offer = [](Rig& from) {
    const int32_t id = from.Offer(60'000, 50'000);
    from.Pump();
    return from.client.answer(id).status();
  };
  for (int i = 0; i < 15; ++i) CHECK_EQ(offer(rig), -1);
  CHECK_EQ(offer(rig), kResourceExhausted);
  CHECK_EQ(offer(other), -1);
  CHECK_EQ(offer(rig), kResourceExhausted);
  CHECK_EQ(offer(other), -1);
  other.session.reset();
  other.Take();
  rig.session.reset();
  rig.Take();
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
}

TEST(metadata_of_all_calls_together_is_bounded) {
  Options options;
  options.max_received_bytes = 100'000;
  Rig rig(options);
  std::vector<int32_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(rig.client.Begin("/a/b", {{"k", std::string(10'000, 'v')}}));
  rig.Pump();
  CHECK(rig.state.totals->received_bytes <= 115'000);
  CHECK_EQ(rig.client.answer(ids.front()).status(), -1);
  CHECK_EQ(rig.client.answer(ids.back()).status(), kResourceExhausted);
  for (int32_t id : ids) rig.client.Cancel(id);
  rig.Pump();
  rig.Take();
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
}

TEST(messages_without_bytes_are_bounded) {
  Options options;
  options.max_received_bytes = 100'000;
  Rig rig(options);
  const int32_t id = rig.client.Begin("/a/b");
  for (int i = 0; i < 10'000; ++i) rig.client.Send(id, "");
  rig.Pump();
  CHECK(rig.Count(EventKind::kMessage) < 2'000);
  CHECK_EQ(rig.client.answer(id).status(), kResourceExhausted);
  rig.Take();
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
}

TEST(binary_values_in_one_field_count_as_fields) {
  Rig rig;
  const int32_t few = rig.client.Begin("/a/b", {{"k-bin", std::string(100, ',')}});
  const int32_t many = rig.client.Begin("/a/b", {{"k-bin", std::string(8'000, ',')}});
  rig.Pump();
  CHECK_EQ(rig.client.answer(few).status(), -1);
  CHECK_EQ(rig.client.answer(many).status(), kResourceExhausted);
}

TEST(answers_to_reset_calls_that_nobody_reads_do_not_pile_up) {
  Options options;
  options.reset_burst = options.reset_rate = 1'000'000;
  Rig rig(options);
  rig.session->Feed(test::RawOpening());
  // Refused at once, for its timeout.
  const std::string block = test::RawHeaderBlock({{"grpc-timeout", "soon"}});
  int num_calls = 0;
  for (int32_t id = 1; num_calls < 10'000; id += 2, ++num_calls) {
    const std::string reset =
        test::RawFrame(NGHTTP2_RST_STREAM, 0, static_cast<uint32_t>(id), std::string(4, '\0'));
    if (!rig.session->Feed(
            test::RawFrame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, static_cast<uint32_t>(id), block) +
            reset))
      break;
  }
  CHECK(num_calls < 5'000);
  std::string down;
  rig.session->Pull(&down, 16 << 20);
  CHECK(down.find("reads_too_little") != std::string::npos);
}

TEST(a_message_that_stops_coming_is_given_up) {
  Options options;
  options.message_stall_s = 3;
  Rig rig(options);
  const int32_t id = rig.client.Begin("/a/b");
  rig.client.SendRaw(id, test::Framed("whole"));
  rig.Pump();
  rig.Take();
  rig.Later(60);
  CHECK_EQ(rig.Take().size(), 0u);
  rig.client.SendRaw(id, test::Framed("half").substr(0, 7));
  rig.Pump();
  rig.Later(3.1);
  CHECK_EQ(rig.Count(EventKind::kCancelled), 1u);
  CHECK_EQ(rig.client.answer(id).status(), kResourceExhausted);
}

TEST(a_call_that_ended_before_it_asked_is_told_to_nobody) {
  Options options;
  options.bounded_paths = {"/a/b"};
  options.max_open = 4;
  Rig rig(options);
  const int32_t id = rig.client.Begin("/a/b", {{"grpc-timeout", "1S"}});
  rig.Pump();
  // The client does not see the end before the drain begins.
  rig.state.now_ns += 2 * kSecond;
  Stream* stream = rig.state.timers.begin()->stream;
  rig.state.timers.erase(rig.state.timers.begin());
  rig.session->OnTimer(stream);
  rig.session->Drain();
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), kDeadlineExceeded);
  CHECK_EQ(rig.Take().size(), 0u);
  CHECK_EQ(rig.state.totals->calls.load(), 0);
}

TEST(calls_that_ask_nothing_give_way_where_calls_are_scarce) {
  Options options;
  options.max_calls = 8;
  options.message_stall_s = 3;
  options.keepalive_s = 0;
  Rig rig(options);
  const int32_t talking = rig.client.Begin("/a/b");
  rig.client.Send(talking, "m");
  const CallRef first = rig.TakeCall();
  const int32_t silent = rig.client.Begin("/a/b");
  const CallRef second = rig.TakeCall();
  rig.Later(60);
  CHECK_EQ(rig.client.answer(silent).status(), -1);
  rig.client.Begin("/a/b");
  const CallRef third = rig.TakeCall();
  const int32_t last = rig.client.Begin("/a/b");
  const CallRef fourth = rig.TakeCall();
  rig.Later(1);
  CHECK_EQ(rig.client.answer(silent).status(), kResourceExhausted);
  CHECK_EQ(rig.client.answer(last).status(), -1);
  CHECK_EQ(rig.client.answer(talking).status(), -1);
  CHECK_EQ(rig.Count(EventKind::kCancelled), 1u);
}

TEST(a_request_that_ends_within_a_message_is_refused) {
  Rig rig;
  const int32_t id = rig.client.Begin("/a/b");
  rig.client.SendRaw(id, test::Framed("half").substr(0, 7));
  rig.client.HalfClose(id);
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), kInvalidArgument);
  CHECK_EQ(rig.Count(EventKind::kCancelled), 1u);
}

TEST(calls_beyond_the_limit_wait_or_are_refused) {
  Options options;
  options.max_streams = 3;
  Rig rig(options);
  rig.Pump();  // the client must know the limit
  for (int i = 0; i < 5; ++i) rig.client.Ask("/a/b", "x");
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kCall), 3u);
  for (Event& event : rig.Take()) {
    if (event.kind == EventKind::kCall) rig.Finish(event.call);
  }
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kCall), 2u);

  Options small;
  small.max_calls = 2;
  Rig full(small);
  std::vector<int32_t> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(full.client.Ask("/a/b", "x"));
  full.Pump();
  CHECK_EQ(full.Count(EventKind::kCall), 2u);
  CHECK_EQ(full.client.answer(ids[2]).status(), kResourceExhausted);
}

TEST(metadata_beyond_the_limit_is_refused_and_far_beyond_ends_the_connection) {
  Options options;
  options.max_metadata_bytes = 4096;
  Rig rig(options);
  Fields more;
  for (int i = 0; i < 10; ++i) more.emplace_back("k" + std::to_string(i), std::string(500, 'v'));
  const int32_t id = rig.client.Ask("/a/b", "x", more);
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), kResourceExhausted);
  CHECK_EQ(rig.Take().size(), 0u);
  // One field in the compression table, then a reference of one byte to it, over and over.
  std::string block = test::RawHeaderBlock();
  block += std::string("\x40\x01k\x7f\xb9\x1e", 6) + std::string(4000, 'v');
  block += std::string(9000, '\xbe');
  Rig bomb(options);
  bomb.Attack(test::RawOpening());
  bomb.Attack(test::RawFrame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, block));
  CHECK(!bomb.is_fed);
  CHECK_EQ(bomb.Take().size(), 0u);
}

TEST(pings_sooner_than_allowed_end_the_connection) {
  Options options;
  options.client_ping_s = 10;
  Rig rig(options);
  rig.Pump();
  for (int i = 0; i < 5; ++i) {
    rig.client.Ping();
    rig.Later(10.1);
  }
  CHECK(rig.client.goaways.empty());
  for (int i = 0; i < 3; ++i) {
    rig.client.Ping();
    rig.Later(1);
  }
  CHECK_EQ(rig.client.goaways.size(), 1u);
  CHECK_EQ(rig.client.goaways[0].error_code, static_cast<uint32_t>(NGHTTP2_ENHANCE_YOUR_CALM));
  CHECK_EQ(Text(rig.client.goaways[0]), "too_many_pings");
  CHECK(rig.session->is_done());
}

TEST(pings_are_free_while_data_flows) {
  Options options;
  options.client_ping_s = 300;
  Rig rig(options);
  rig.client.Ask("/a/b", "x");
  const CallRef call = rig.TakeCall();
  for (int i = 0; i < 50; ++i) {
    rig.Write(call, "m");
    rig.client.Ping();
    rig.Later(0.1);
  }
  CHECK(rig.client.goaways.empty());
}

TEST(a_silent_client_is_pinged_and_given_up) {
  Options options;
  options.keepalive_s = 10;
  options.keepalive_timeout_s = 5;
  Rig rig(options);
  rig.Pump();
  rig.Later(10.1);
  CHECK_EQ(rig.client.num_pings_received, 1);
  rig.Later(6);
  CHECK(rig.is_alive);  // it answered
  rig.state.now_ns += 11 * kSecond;
  CHECK(rig.session->Tick());
  rig.state.now_ns += 6 * kSecond;
  CHECK(!rig.session->Tick());  // and now it did not
}

TEST(connections_that_do_nothing_are_closed) {
  Options options;
  options.handshake_s = 5;
  options.idle_s = 100;
  options.keepalive_s = 0;
  Rig silent(options);
  silent.state.now_ns += 6 * kSecond;
  CHECK(!silent.session->Tick());
  Rig idle(options);
  idle.Pump();
  idle.Later(99);
  CHECK(idle.client.goaways.empty());
  idle.Later(2);
  CHECK_EQ(idle.client.goaways.size(), 1u);
  idle.Later(2);
  CHECK(idle.session->is_done());
}

TEST(a_header_block_must_end_in_time) {
  Options options;
  options.header_s = 5;
  Rig rig(options);
  rig.Attack(test::RawOpening());
  rig.Attack(test::RawFrame(NGHTTP2_HEADERS, 0, 1, test::RawHeaderBlock()));
  rig.state.now_ns += 6 * kSecond;
  CHECK(!rig.session->Tick());
  Rig good(options);
  good.client.Ask("/a/b", "x");
  good.Pump();
  good.state.now_ns += 6 * kSecond;
  CHECK(good.session->Tick());
}

TEST(a_peer_that_does_not_read_our_last_words_is_dropped) {
  Options options;
  options.keepalive_s = options.idle_s = 0;
  Rig rig(options);
  rig.session->Feed(test::RawOpening());
  while (rig.session->Feed(test::RawFrame(NGHTTP2_PING, 0, 0, "12345678"))) continue;
  CHECK(rig.session->Tick());
  rig.state.now_ns += 6 * kSecond;
  CHECK(!rig.session->Tick());
}

TEST(draining_lets_what_was_begun_end) {
  Rig rig;
  const int32_t early = rig.client.Ask("/a/early", "x");
  const CallRef first = rig.TakeCall();
  rig.session->Drain();
  // On its way when the first GOAWAY was sent.
  const int32_t late = rig.client.Ask("/a/late", "x");
  CHECK(rig.session->Feed(rig.client.Pull()));
  const CallRef second = rig.TakeCall();
  CHECK_EQ(rig.client.goaways.size(), 2u);
  CHECK_EQ(rig.client.goaways[0].last_stream_id, 0x7fffffff);
  CHECK_EQ(rig.client.goaways[1].last_stream_id, late);
  CHECK(!rig.session->is_done());
  rig.Write(first, "answer");
  rig.Finish(first);
  rig.Finish(second);
  rig.Pump();
  CHECK_EQ(rig.client.answer(early).status(), 0);
  CHECK_EQ(rig.client.answer(late).status(), 0);
  CHECK(rig.session->is_done());
}

TEST(rapid_reset_ends_the_connection) {
  Options options;
  options.reset_burst = 50;
  options.reset_rate = 1;
  Rig rig(options);
  rig.Attack(test::RawOpening());
  const std::string block = test::RawHeaderBlock();
  int num_begun = 0;
  for (uint32_t id = 1; id < 1000 && rig.is_fed && !rig.session->is_done(); id += 2) {
    ++num_begun;
    rig.Attack(test::RawFrame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, id, block) +
               test::RawFrame(NGHTTP2_RST_STREAM, 0, id, std::string("\0\0\0\x08", 4)));
  }
  CHECK(num_begun <= 60);
  CHECK(rig.session->is_done());
}

TEST(handlers_of_reset_calls_count_against_the_connection) {
  Options options;
  options.max_streams = 10;
  options.reset_burst = 100'000;
  Rig rig(options);
  rig.Pump();
  std::vector<Event> kept;
  for (int i = 0; i < 500; ++i) {
    const int32_t id = rig.client.Ask("/a/b", "x");
    rig.Pump();
    rig.client.Cancel(id);
    rig.Pump();
    for (Event& event : rig.Take()) kept.push_back(std::move(event));
  }
  const auto num_calls = std::count_if(kept.begin(), kept.end(),
                                       [](const Event& event) { return event.kind == EventKind::kCall; });
  CHECK(num_calls <= 10 + 64);
  kept.clear();
  const int32_t id = rig.client.Ask("/a/b", "x");
  rig.Pump();
  CHECK_EQ(rig.Count(EventKind::kCall), 1u);
  CHECK(!rig.client.answer(id).is_closed);
}

TEST(floods_of_frames_that_carry_nothing_end_the_connection) {
  const std::string block = test::RawHeaderBlock();
  const std::string begin = test::RawFrame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS, 1, block);
  struct Case {
    const char* name;
    std::string before;
    std::string frame;
  };
  const std::vector<Case> cases = {
      {"empty DATA", begin, test::RawFrame(NGHTTP2_DATA, 0, 1, "")},
      {"SETTINGS", "", test::RawFrame(NGHTTP2_SETTINGS, 0, 0, "")},
      {"PING", "", test::RawFrame(NGHTTP2_PING, 0, 0, "12345678")},
      {"PRIORITY", "", test::RawFrame(NGHTTP2_PRIORITY, 0, 3, std::string("\0\0\0\0\x10", 5))},
      {"CONTINUATION", test::RawFrame(NGHTTP2_HEADERS, 0, 1, block),
       test::RawFrame(NGHTTP2_CONTINUATION, 0, 1, "")},
  };
  for (const Case& one : cases) {
    Rig rig;
    rig.Attack(test::RawOpening() + one.before);
    std::string down;
    int num_sent = 0;
    while (num_sent < 5000 && rig.is_fed && !rig.session->is_done()) {
      rig.Attack(one.frame);
      ++num_sent;
    }
    if (num_sent >= 5000) throw test::Failure{std::string(one.name) + " goes on for ever"};
  }
}

TEST(answers_to_a_peer_that_reads_nothing_do_not_pile_up) {
  // PING and SETTINGS ask for answers, which wait in nghttp2 until they are pulled.
  for (const std::string& frame :
       {test::RawFrame(NGHTTP2_PING, 0, 0, "12345678"), test::RawFrame(NGHTTP2_SETTINGS, 0, 0, "")}) {
    Options options;
    options.client_ping_s = 0;
    options.idle_frame_burst = options.idle_frame_rate = 1'000'000'000;
    Rig rig(options);
    rig.session->Feed(test::RawOpening());
    int num_sent = 0;
    while (num_sent < 5000 && rig.session->Feed(frame)) ++num_sent;
    CHECK(num_sent < 5000);
  }
}

TEST(trailers_larger_than_http2_can_carry_do_not_hang_the_call) {
  Rig rig;
  const int32_t id = rig.client.Ask("/a/b", "x");
  const CallRef call = rig.TakeCall();
  rig.Write(call, "m");
  rig.Finish(call, {kInternal, "broken", {{"big", std::string(100'000, 'b')}}});
  rig.Pump();
  CHECK_EQ(rig.client.answer(id).status(), kInternal);
  const int32_t other = rig.client.Ask("/a/b", "x");
  const CallRef second = rig.TakeCall();
  rig.Do(CommandKind::kHeaders, second, 0, {{"big", std::string(100'000, 'b')}});
  rig.Pump();
  CHECK(rig.client.answer(other).is_closed);
}

TEST(random_calls_leave_nothing_behind) {
  auto random = test::Random();
  Options options;
  options.max_message_bytes = 5000;
  Rig rig(options, true, 20'000);
  std::vector<int32_t> ids;
  std::vector<CallRef> calls;
  for (int i = 0; i < 3000; ++i) {
    switch (random() % 8) {
      case 0:
      case 1:
        ids.push_back(rig.client.Begin("/a/b", random() % 3 ? Fields{} : Fields{{"grpc-timeout", "1S"}}));
        break;
      case 2:
        if (!ids.empty()) rig.client.Send(ids[random() % ids.size()], std::string(random() % 5100, 'u'));
        break;
      case 3:
        if (!ids.empty()) rig.client.HalfClose(ids[random() % ids.size()]);
        break;
      case 4:
        if (!ids.empty()) rig.client.Cancel(ids[random() % ids.size()]);
        break;
      case 5:
        if (!calls.empty()) {
          const CallRef& call = calls[random() % calls.size()];
          if (!call->is_over()) rig.Write(call, std::string(random() % 30'000, 'd'));
        }
        break;
      case 6:
        if (!calls.empty()) {
          const size_t at = random() % calls.size();
          rig.Finish(calls[at], {static_cast<int>(random() % 17), "m", {}});
          calls.erase(calls.begin() + static_cast<int64_t>(at));
        }
        break;
      default:
        rig.Later(0.1);
    }
    rig.Pump();
    for (Event& event : rig.Take()) {
      if (event.kind == EventKind::kCall) calls.push_back(event.call);
      if (event.kind == EventKind::kMessage) rig.Do(CommandKind::kAck, event.call, event.bytes.size());
    }
  }
  for (const CallRef& call : calls) rig.Finish(call);
  calls.clear();
  rig.Pump();
  rig.session.reset();
  rig.Take();
  CHECK_EQ(rig.state.totals->calls.load(), 0);
  CHECK_EQ(rig.state.totals->received_bytes.load(), 0);
  CHECK(rig.state.timers.empty());
}
