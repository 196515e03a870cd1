#include "door/fields.h"

#include <cstdint>
#include <utility>

#include "door/wire.h"

namespace twinjet::door {

namespace {

// The longest beginning of text that takes no more than kMaxMessageBytes when encoded, cut between
// characters.
std::string_view Beginning(std::string_view text) {
  size_t num_encoded = 0;
  size_t fitting = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if ((byte & 0xc0) != 0x80) fitting = i;
    num_encoded += byte >= 0x20 && byte <= 0x7e && byte != '%' ? 1 : 3;
    if (num_encoded > kMaxMessageBytes) return text.substr(0, fitting);
  }
  return text;
}

}  // namespace

size_t MetadataBytes(const Metadata& metadata) {
  size_t total = 0;
  for (const MetadataEntry& entry : metadata) {
    total += entry.key.size() + entry.value.size() * (IsBinaryKey(entry.key) ? 4 : 3) / 3 + kHeaderOverhead;
  }
  return total;
}

void FieldList::AddOpening(std::string_view http_status, bool is_gzip) {
  Add(":status", http_status);
  Add("content-type", "application/grpc");
  if (is_gzip) Add("grpc-encoding", "gzip");
  Add("grpc-accept-encoding", "identity,deflate,gzip");
}

void FieldList::AddStatus(const Status& status) {
  Keep("grpc-status", std::to_string(status.code));
  if (!status.message.empty()) Keep("grpc-message", PercentEncode(Beginning(status.message)));
  AddMetadata(status.trailers);
}

void FieldList::AddMetadata(const Metadata& metadata) {
  for (const MetadataEntry& entry : metadata) {
    if (IsBinaryKey(entry.key)) {
      Keep(entry.key, Base64Encode(entry.value));
    } else {
      Add(entry.key, entry.value);
    }
  }
}

void FieldList::Add(std::string_view name, std::string_view value) {
  fields_.push_back({reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
                     reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(),
                     NGHTTP2_NV_FLAG_NONE});
}

void FieldList::Keep(std::string_view name, std::string value) {
  kept_.push_back(std::make_unique<std::string>(std::move(value)));
  Add(name, *kept_.back());
}

}  // namespace twinjet::door
