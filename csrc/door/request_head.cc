#include "door/request_head.h"

#include <cstdint>
#include <utility>

#include "door/fields.h"

namespace twinjet::door {
namespace {

bool IsGrpcContentType(std::string_view type) {
  constexpr std::string_view kType = "application/grpc";
  if (!type.starts_with(kType)) return false;
  type.remove_prefix(kType.size());
  return type.empty() || type.front() == '+' || type.front() == ';';
}

}  // namespace

void RequestHead::Add(std::string_view name, std::string_view value) {
  if (name == ":path") {
    info_->path = value;
  } else if (name == ":method") {
    method_ = value;
  } else if (name == "content-type") {
    content_type_ = value;
  } else if (name == "grpc-timeout") {
    const std::optional<int64_t> timeout_ns = ParseTimeout(value);
    has_bad_timeout_ = !timeout_ns;
    info_->timeout_ns = timeout_ns.value_or(-1);
  } else if (name == "grpc-encoding") {
    encoding_ = ParseEncoding(value);
  } else if (name == "grpc-accept-encoding") {
    info_->accepts_gzip = AcceptsGzip(value);
  } else if (name == "te" || name.starts_with(':')) {
    return;
  } else if (IsBinaryKey(name)) {
    AddBinary(name, value);
  } else if (IsMetadataKey(name) && IsAsciiValue(value)) {
    info_->metadata.push_back({std::string(name), std::string(value)});
  } else {
    bad_metadata_ = "a metadata key or value has characters that gRPC does not allow";
  }
}

void RequestHead::AddBinary(std::string_view name, std::string_view values) {
  while (true) {
    const size_t comma = values.find(',');
    std::optional<std::string> decoded = Base64Decode(values.substr(0, comma));
    if (!decoded) {
      bad_metadata_ = "metadata " + std::string(name) + " is not base64";
      return;
    }
    info_->metadata.push_back({std::string(name), std::move(*decoded)});
    if (comma == std::string_view::npos) return;
    values.remove_prefix(comma + 1);
    // Else a few bytes of commas would become a hundred times as much memory.
    num_split_bytes_ += name.size() + kHeaderOverhead;
    if (num_split_bytes_ > max_bytes_) return;
  }
}

bool RequestHead::AddInvalid() {
  if (!bad_metadata_.empty()) return false;
  bad_metadata_ = "a metadata key or value has characters that HTTP/2 does not allow";
  return true;
}

std::optional<Refusal> RequestHead::Check(size_t num_bytes) const {
  num_bytes += num_split_bytes_;
  if (method_ != "POST") {
    return Refusal{kUnimplemented, "method " + method_ + "; gRPC calls are POST", "405"};
  }
  if (!IsGrpcContentType(content_type_)) {
    return Refusal{kInvalidArgument, "content-type must be application/grpc", "415"};
  }
  if (num_bytes > max_bytes_) {
    return Refusal{kResourceExhausted, "metadata of " + std::to_string(num_bytes) +
                                           " bytes; allowed: " + std::to_string(max_bytes_)};
  }
  if (!bad_metadata_.empty()) return Refusal{kInvalidArgument, bad_metadata_};
  if (has_bad_timeout_) {
    return Refusal{kInvalidArgument, "grpc-timeout must be up to 8 digits and one of HMSmun"};
  }
  if (encoding_ == Encoding::kUnknown) {
    return Refusal{kUnimplemented, "grpc-encoding must be identity, gzip or deflate"};
  }
  return std::nullopt;
}

}  // namespace twinjet::door
