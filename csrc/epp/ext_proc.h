// What of envoy.service.ext_proc.v3.ProcessingRequest (Envoy 1.40) the endpoint picker reads.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace twinjet::epp {

struct ProcessingRequest {
  enum class Kind : uint8_t {
    kNone = 0,
    kRequestHeaders = 2,
    kResponseHeaders = 3,
    kRequestBody = 4,
    kResponseBody = 5,
    kRequestTrailers = 6,
    kResponseTrailers = 7,
  };
  Kind kind = Kind::kNone;
  bool is_end_of_stream = false;
  std::string_view body;
  std::vector<std::pair<std::string_view, std::string_view>> headers;  // of headers and trailers alike
  // ProcessingMode.BodySendMode each; -1: not told in this message.
  int32_t request_body_mode = -1;
  int32_t response_body_mode = -1;
  std::vector<std::string_view> allowed;  // x-gateway-destination-endpoint-subset of envoy.lb.subset_hint
  bool has_allowed = false;
  std::string_view source_address;  // the attribute source.address: "192.0.2.1:1234"; "" if it was not sent
};

// Views point into `data`. False if it is no such message.
bool ReadProcessingRequest(std::string_view data, ProcessingRequest* request);

}  // namespace twinjet::epp
