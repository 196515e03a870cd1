// The header blocks of the door's answers.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "door/call.h"

namespace twinjet::door {

inline constexpr size_t kHeaderOverhead = 32;  // a field's, by HTTP/2's definition of a header list's size

// Of an answer's metadata and of its status's message, encoded. HTTP/2 libraries, nghttp2 among them, refuse
// header lists beyond 64 KiB.
inline constexpr size_t kMaxMetadataBytes = 32 << 10;
inline constexpr size_t kMaxMessageBytes = 16 << 10;

// As HTTP/2 counts the size of a header list.
size_t MetadataBytes(const Metadata& metadata);

// Header fields for one submission, and what their values need to be kept in. What is added must outlive the
// list; nghttp2 copies names and values when they are submitted.
class FieldList {
 public:
  // The fields of a gRPC answer's first block.
  void AddOpening(std::string_view http_status, bool is_gzip);
  // Leaves out what is too much of the message.
  void AddStatus(const Status& status);
  void AddMetadata(const Metadata& metadata);

  const nghttp2_nv* data() const { return fields_.data(); }
  size_t size() const { return fields_.size(); }

 private:
  void Add(std::string_view name, std::string_view value);
  void Keep(std::string_view name, std::string value);

  std::vector<nghttp2_nv> fields_;
  std::vector<std::unique_ptr<std::string>> kept_;
};

}  // namespace twinjet::door
