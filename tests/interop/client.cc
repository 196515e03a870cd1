// gRPC's interoperability cases with gRPC C++; client PORT prints each case that passed. Messages are written
// and read field by field, so that no generated code is needed.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace {

const std::vector<size_t> kResponses = {31415, 9, 2653, 58979};
const std::vector<size_t> kRequests = {27182, 8, 1828, 45904};
const std::string kSpecial = "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n";
const std::string kInitial = "x-grpc-test-echo-initial";
const std::string kTrailing = "x-grpc-test-echo-trailing-bin";
const std::string kService = "/grpc.testing.TestService/";

void Must(bool is_so, const char* name) {
  if (is_so) return;
  std::fprintf(stderr, "%s failed\n", name);
  std::exit(1);
}

std::string Varint(size_t value) {
  std::string out;
  for (; value >= 128; value >>= 7) out += static_cast<char>(value | 128);
  return out + static_cast<char>(value);
}
std::string Number(size_t field, size_t value) { return Varint(field << 3) + Varint(value); }
std::string Nested(size_t field, const std::string& value) {
  return Varint(field << 3 | 2) + Varint(value.size()) + value;
}
std::string Payload(size_t field, size_t size) { return Nested(field, Nested(2, std::string(size, '\0'))); }
std::string EchoStatus(const std::string& text) { return Nested(7, Number(1, 2) + Nested(2, text)); }
std::string Ask(size_t response, size_t request, size_t interval_us = 0) {
  return Nested(2, Number(1, response) + Number(2, interval_us)) + Payload(3, request);
}

grpc::ByteBuffer Buffer(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}
std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string out;
  if (!buffer.Dump(&slices).ok()) return out;
  for (const grpc::Slice& slice : slices) out.append(slice.begin(), slice.end());
  return out;
}
// Whether a response's payload, its field 1, has a body of so many bytes.
bool HasBody(const std::string& message, size_t size) { return message == Payload(1, size); }

// A call whose operations wait for their end.
class Call {
 public:
  Call(grpc::GenericStub* stub, const std::string& method) : stub_(stub), method_(method) {}
  grpc::ClientContext context;

  void Start() {
    stream_ = stub_->PrepareCall(&context, method_, &queue_);
    stream_->StartCall(this);
    Wait();
  }
  bool Write(const std::string& message) {
    stream_->Write(Buffer(message), this);
    return Wait();
  }
  void WritesDone() {
    stream_->WritesDone(this);
    Wait();
  }
  bool Read(std::string* message) {
    grpc::ByteBuffer buffer;
    stream_->Read(&buffer, this);
    if (!Wait()) return false;
    *message = Bytes(buffer);
    return true;
  }
  grpc::Status Finish() {
    grpc::Status status;
    stream_->Finish(&status, this);
    Wait();
    return status;
  }
  // One request, and the last of the responses.
  grpc::Status Unary(const std::string& request, std::string* response) {
    Start();
    Write(request);
    WritesDone();
    Read(response);
    return Finish();
  }

 private:
  bool Wait() {
    void* tag = nullptr;
    bool is_ok = false;
    Must(queue_.Next(&tag, &is_ok), "completion queue");
    return is_ok;
  }

  grpc::GenericStub* stub_;
  std::string method_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
};

void CheckMetadata(const grpc::ClientContext& context, const char* name) {
  const auto initial = context.GetServerInitialMetadata().find(kInitial);
  const auto trailing = context.GetServerTrailingMetadata().find(kTrailing);
  Must(
      initial != context.GetServerInitialMetadata().end() && initial->second == "test_initial_metadata_value",
      name);
  Must(trailing != context.GetServerTrailingMetadata().end() && trailing->second == "\xab\xab\xab", name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  grpc::GenericStub stub(
      grpc::CreateChannel(std::string("127.0.0.1:") + argv[1], grpc::InsecureChannelCredentials()));
  std::string response;
  const auto passed = [](const char* name) { std::puts(name); };
  {
    Call call(&stub, kService + "EmptyCall");
    Must(call.Unary("", &response).ok() && response.empty(), "empty_unary");
    passed("empty_unary");
  }
  for (bool is_compressed : {false, true}) {
    const char* name = is_compressed ? "compressed_unary" : "large_unary";
    Call call(&stub, kService + "UnaryCall");
    if (is_compressed) call.context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
    Must(call.Unary(Number(2, 314159) + Payload(3, 271828), &response).ok() && HasBody(response, 314159),
         name);
    passed(name);
  }
  {
    Call call(&stub, kService + "StreamingInputCall");
    call.Start();
    for (size_t size : kRequests) Must(call.Write(Payload(1, size)), "client_streaming");
    call.WritesDone();
    Must(call.Read(&response) && response == Number(1, 74922) && call.Finish().ok(), "client_streaming");
    passed("client_streaming");
  }
  {
    Call call(&stub, kService + "StreamingOutputCall");
    std::string request;
    for (size_t size : kResponses) request += Nested(2, Number(1, size));
    call.Start();
    call.Write(request);
    call.WritesDone();
    for (size_t size : kResponses) Must(call.Read(&response) && HasBody(response, size), "server_streaming");
    Must(!call.Read(&response) && call.Finish().ok(), "server_streaming");
    passed("server_streaming");
  }
  for (size_t num_rounds : {kResponses.size(), size_t{0}}) {
    const char* name = num_rounds > 0 ? "ping_pong" : "empty_stream";
    Call call(&stub, kService + "FullDuplexCall");
    call.Start();
    for (size_t i = 0; i < num_rounds; ++i) {
      Must(call.Write(Ask(kResponses[i], kRequests[i])), name);
      Must(call.Read(&response) && HasBody(response, kResponses[i]), name);
    }
    call.WritesDone();
    Must(!call.Read(&response) && call.Finish().ok(), name);
    passed(name);
  }
  {
    Call call(&stub, kService + "StreamingInputCall");
    call.Start();
    call.context.TryCancel();
    Must(call.Finish().error_code() == grpc::CANCELLED, "cancel_after_begin");
    passed("cancel_after_begin");
  }
  {
    Call call(&stub, kService + "FullDuplexCall");
    call.Start();
    call.Write(Ask(kResponses[0], kRequests[0]));
    Must(call.Read(&response), "cancel_after_first_response");
    call.context.TryCancel();
    Must(call.Finish().error_code() == grpc::CANCELLED, "cancel_after_first_response");
    passed("cancel_after_first_response");
  }
  {
    Call call(&stub, kService + "FullDuplexCall");
    call.context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
    call.Start();
    call.Write(Ask(kResponses[0], kRequests[0], 20'000'000));
    Must(!call.Read(&response) && call.Finish().error_code() == grpc::DEADLINE_EXCEEDED,
         "timeout_on_sleeping_server");
    passed("timeout_on_sleeping_server");
  }
  for (const std::string& text : {std::string("test status message"), kSpecial}) {
    for (const char* method : {"UnaryCall", "FullDuplexCall"}) {
      Call call(&stub, kService + method);
      const grpc::Status status = call.Unary(EchoStatus(text), &response);
      Must(status.error_code() == grpc::UNKNOWN && status.error_message() == text, "status_code_and_message");
    }
  }
  passed("status_code_and_message");
  for (bool is_unary : {true, false}) {
    Call call(&stub, kService + (is_unary ? "UnaryCall" : "FullDuplexCall"));
    call.context.AddMetadata(kInitial, "test_initial_metadata_value");
    call.context.AddMetadata(kTrailing, "\xab\xab\xab");
    Must(call.Unary(is_unary ? Number(2, 10) : Ask(10, 10), &response).ok() && HasBody(response, 10),
         "custom_metadata");
    CheckMetadata(call.context, "custom_metadata");
  }
  passed("custom_metadata");
  for (const char* service : {"TestService", "UnimplementedService"}) {
    Call call(&stub, std::string("/grpc.testing.") + service + "/UnimplementedCall");
    Must(call.Unary("", &response).error_code() == grpc::UNIMPLEMENTED, "unimplemented_method_and_service");
  }
  passed("unimplemented_method_and_service");
  return 0;
}
