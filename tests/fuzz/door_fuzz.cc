// libFuzzer's target for the door: hostile bytes into a session, and hostile text into gRPC's encodings.
//
// The input is a program: each step begins with a byte that says what to do and, for bytes from the client,
// two bytes of length. Handlers answer what they get in ways that the input chooses, so that the session's
// whole life is reached. Build with clang and -fsanitize=fuzzer,address,undefined (see Makefile, fuzz-door).
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "door/session.h"
#include "door/wire.h"

using namespace twinjet::door;

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

// The pieces of the input, each valid however little is left.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : left_(reinterpret_cast<const char*>(data), size) {}
  bool is_empty() const { return left_.empty(); }
  uint8_t Byte() {
    if (left_.empty()) return 0;
    const auto byte = static_cast<uint8_t>(left_.front());
    left_.remove_prefix(1);
    return byte;
  }
  std::string_view Bytes(size_t size) {
    const std::string_view taken = left_.substr(0, size);
    left_.remove_prefix(taken.size());
    return taken;
  }

 private:
  std::string_view left_;
};

// One frame's header with a payload of the input: most random bytes would not even be a frame.
std::string MakeFrame(Input& input) {
  const uint8_t type = input.Byte() % 12;
  const uint8_t flags = input.Byte();
  const uint8_t stream_id = input.Byte() % 16;
  const std::string_view payload = input.Bytes(input.Byte());
  std::string frame{
      '\0', '\0', static_cast<char>(payload.size()), static_cast<char>(type), static_cast<char>(flags), '\0',
      '\0', '\0', static_cast<char>(stream_id)};
  return frame.append(payload);
}

std::string MakeCall(Input& input) {
  constexpr std::string_view kBlock(
      "\x83\x86\x44\x04/a/b\x41\x01x\x5f\x10"
      "application/grpc",
      30);
  std::string block(kBlock);
  const uint8_t choice = input.Byte();
  if (choice & 1) block += std::string("\x00\x0cgrpc-timeout\x02", 15) + "1m";
  if (choice & 2) block += std::string("\x00\x0dgrpc-encoding\x04gzip", 20);
  if (choice & 4) block += std::string("\x00\x05k-bin\x04", 8) + "AAEC";
  const uint8_t flags = static_cast<uint8_t>(4 | (choice >> 7));
  std::string frame{'\0',
                    '\0',
                    static_cast<char>(block.size()),
                    '\x01',
                    static_cast<char>(flags),
                    '\0',
                    '\0',
                    '\0',
                    static_cast<char>((choice >> 3 & 7) * 2 + 1)};
  return frame + block;
}

void FuzzEncodings(std::string_view text) {
  bool is_too_large = false;
  Require(PercentDecode(PercentEncode(text)) == text);
  Require(Base64Decode(Base64Encode(text)).value() == text);
  Base64Decode(text);
  ParseTimeout(text);
  AcceptsGzip(text);
  if (const auto plain = Inflate(text, 4096, &is_too_large)) Require(plain->size() <= 4096);
}

void Run(Input& input) {
  Options options;
  options.max_message_bytes = 1000;
  options.max_metadata_bytes = 2000;
  options.max_streams = 4;
  options.max_calls = 6;
  options.max_received_bytes = 5000;
  options.max_unsent_bytes = 3000;
  options.stream_window_bytes = 2000;
  options.idle_s = 50;
  LoopState state;
  state.options = &options;
  state.totals = std::make_shared<Totals>();
  state.mailbox = std::make_shared<Mailbox>();
  state.now_ns = 1'000'000'000;
  auto session = std::make_unique<Session>(&state, std::make_shared<ConnectionStats>("unix:"),
                                           std::make_shared<Client>());
  std::vector<CallRef> calls;
  bool is_fed = true;
  if (input.Byte() % 8 != 0) {
    is_fed = session->Feed(std::string(NGHTTP2_CLIENT_MAGIC, NGHTTP2_CLIENT_MAGIC_LEN) +
                           std::string("\0\0\0\4\0\0\0\0\0", 9));
  }
  while (!input.is_empty()) {
    const uint8_t step = input.Byte();
    const CallRef call = calls.empty() ? nullptr : calls[input.Byte() % calls.size()];
    const bool is_open = call && !call->is_over();
    switch (step % 12) {
      case 0:
      case 1:
        if (is_fed) is_fed = session->Feed(MakeCall(input));
        break;
      case 2:
      case 3:
      case 4:
        if (is_fed) is_fed = session->Feed(MakeFrame(input));
        break;
      case 5:
        if (is_fed) is_fed = session->Feed(input.Bytes(static_cast<size_t>(input.Byte()) * 4));
        break;
      case 6: {
        std::string out;
        session->Pull(&out, 1 << 16);
        break;
      }
      case 7:
        if (is_open) {
          Mail mail;
          mail.bytes.assign(static_cast<size_t>(input.Byte()) * 16, 'm');
          call->CountUnsent(mail.bytes.size());
          call->AwaitRoom(500);
          Command command{CommandKind::kMessage, call, 0, mail.bytes.size(), nullptr, nullptr};
          session->Apply(command, mail);
        }
        break;
      case 8:
        if (is_open) {
          Command command{CommandKind::kFinish, call, 0, 0, nullptr, std::make_unique<Status>()};
          command.status->code = step / 12;
          command.status->message = input.Bytes(input.Byte() % 32);
          session->Apply(command, {});
        }
        break;
      case 9:
        if (is_open) {
          constexpr CommandKind kKinds[] = {CommandKind::kHeaders, CommandKind::kReset,
                                            CommandKind::kCompress};
          Command command{kKinds[step / 12 % 3], call, 0, 0, std::make_unique<Metadata>(), nullptr};
          session->Apply(command, {});
        }
        break;
      case 10:
        state.now_ns += static_cast<int64_t>(input.Byte()) * 10'000'000;
        while (!state.timers.empty() && state.timers.begin()->at_ns <= state.now_ns) {
          Stream* stream = state.timers.begin()->stream;
          state.timers.erase(state.timers.begin());
          stream->session->OnTimer(stream);
        }
        if (!session->Tick()) is_fed = false;
        break;
      default:
        if (step / 12 % 8 == 0) session->Drain();
    }
    for (Event& event : std::exchange(state.events, {})) {
      if (event.kind == EventKind::kCall) calls.push_back(event.call);
      if (event.kind == EventKind::kMessage && !event.call->is_over() && step % 2 == 0) {
        Command command{CommandKind::kAck, event.call, 0, event.bytes.size(), nullptr, nullptr};
        session->Apply(command, {});
      }
    }
    Require(state.totals->received_bytes >= 0);
    Require(state.totals->received_bytes <= 40'000);
    Require(!calls.empty() || state.totals->calls == 0);
  }
  session.reset();
  state.events.clear();
  for (const CallRef& call : calls) {
    Require(call->is_over());
    Require(call->unsent_bytes() == 0);
  }
  calls.clear();
  Require(state.timers.empty());
  Require(state.totals->calls == 0);
  Require(state.totals->received_bytes == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  if (data[0] == 0xff) {
    FuzzEncodings({reinterpret_cast<const char*>(data) + 1, size - 1});
    return 0;
  }
  Input input(data, size);
  Run(input);
  return 0;
}
