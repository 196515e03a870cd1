#include "requests/message_shape.h"

#include <algorithm>
#include <stdexcept>

namespace twinjet::requests {
namespace {

constexpr int kMaxDepth = 100;  // as protobuf's parsers
constexpr int32_t kSingle = -4;

enum WireType : uint32_t {
  kVarint = 0,
  kFixed64 = 1,
  kDelimited = 2,
  kGroup = 3,
  kEndGroup = 4,
  kFixed32 = 5
};

bool ReadVarint(std::string_view bytes, size_t* at, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 70; shift += 7) {
    if (*at == bytes.size()) return false;
    const auto byte = static_cast<uint8_t>(bytes[(*at)++]);
    if (shift < 64) *value |= static_cast<uint64_t>(byte & 0x7F) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

size_t CountNumbers(std::string_view packed, int32_t kind) {
  if (kind == kPacked4) return packed.size() / 4;
  if (kind == kPacked8) return packed.size() / 8;
  return static_cast<size_t>(
      std::count_if(packed.begin(), packed.end(), [](char c) { return static_cast<uint8_t>(c) < 0x80; }));
}

class Counter {
 public:
  Counter(const std::vector<MessageShape::Type>& types, size_t max_values, size_t max_numbers)
      : types_(types), values_left_(max_values), numbers_left_(max_numbers) {}

  // False ends it all: the path leads to the excess, or is empty if the message cannot be read.
  bool Count(std::string_view message, size_t type, int depth) {
    size_t at = 0;
    while (at < message.size()) {
      uint64_t tag = 0;
      if (!ReadVarint(message, &at, &tag)) return false;
      const auto number = static_cast<uint32_t>(tag >> 3);
      const int32_t kind = KindOf(type, number);
      std::string_view bytes;
      if (!Skip(message, tag & 7, &at, &bytes)) return false;
      const bool is_number = kind < 0 && kind != kSingle;
      const size_t count = is_number && (tag & 7) == kDelimited ? CountNumbers(bytes, kind) : 1;
      size_t& left = is_number ? numbers_left_ : values_left_;
      if (count > left) {
        path_.push_back(number);
        return false;
      }
      left -= count;
      if (kind < 0 || (tag & 7) != kDelimited) continue;
      if (depth == kMaxDepth) return false;
      if (!Count(bytes, static_cast<size_t>(kind), depth + 1)) {
        if (!path_.empty()) path_.push_back(number);
        return false;
      }
    }
    return true;
  }

  std::vector<uint32_t> path() const { return {path_.rbegin(), path_.rend()}; }

 private:
  int32_t KindOf(size_t type, uint32_t number) const {
    for (const auto& [known, kind] : types_[type]) {
      if (known == number) return kind;
    }
    return kSingle;
  }

  // Of a group its tags count as values of the message around it.
  static bool Skip(std::string_view message, uint64_t wire_type, size_t* at, std::string_view* bytes) {
    uint64_t size = 0;
    switch (wire_type) {
      case kVarint:
        return ReadVarint(message, at, &size);
      case kFixed64:
        size = 8;
        break;
      case kFixed32:
        size = 4;
        break;
      case kDelimited:
        if (!ReadVarint(message, at, &size)) return false;
        break;
      case kGroup:
      case kEndGroup:
        return true;
      default:
        return false;
    }
    if (size > message.size() - *at) return false;
    *bytes = message.substr(*at, static_cast<size_t>(size));
    *at += static_cast<size_t>(size);
    return true;
  }

  const std::vector<MessageShape::Type>& types_;
  size_t values_left_;
  size_t numbers_left_;
  std::vector<uint32_t> path_;  // innermost first
};

}  // namespace

MessageShape::MessageShape(std::vector<Type> types) : types_(std::move(types)) {
  if (types_.empty()) throw std::invalid_argument("a shape needs at least the message's own type");
  for (const Type& type : types_) {
    for (const auto& [number, kind] : type) {
      if (kind <= kSingle || (kind >= 0 && static_cast<size_t>(kind) >= types_.size())) {
        throw std::invalid_argument("a field's kind is none of the types");
      }
    }
  }
}

std::optional<std::vector<uint32_t>> MessageShape::FindExcess(std::string_view message, size_t max_values,
                                                              size_t max_numbers) const {
  Counter counter(types_, max_values, max_numbers);
  if (counter.Count(message, 0, 0)) return std::nullopt;
  std::vector<uint32_t> path = counter.path();
  if (path.empty()) return std::nullopt;
  return path;
}

}  // namespace twinjet::requests
