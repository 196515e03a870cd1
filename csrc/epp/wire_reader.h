// WireReader: the fields of a protobuf message, one after the other, without copying.
#pragma once

#include <cstdint>
#include <string_view>

namespace twinjet::epp {

// A message that ends early is read as far as it goes: its last length-delimited field then holds what is
// there and is_cut() is true. What is no protobuf ends the reading with is_broken().
class WireReader {
 public:
  enum class Type : uint8_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

  explicit WireReader(std::string_view data) : rest_(data) {}

  // Goes to the next field; false at the end, or where the message is cut inside a number, or broken.
  bool Next() {
    if (rest_.empty() || is_cut_ || is_broken_) return false;
    uint64_t tag = 0;
    if (!Varint(&tag)) return false;
    field_ = static_cast<uint32_t>(tag >> 3);
    type_ = static_cast<Type>(tag & 7);
    if (field_ == 0 || tag >> 32 != 0) return Break();
    switch (type_) {
      case Type::kVarint:
        return Varint(&number_);
      case Type::kFixed64:
        return Skip(8);
      case Type::kFixed32:
        return Skip(4);
      case Type::kBytes: {
        uint64_t size = 0;
        if (!Varint(&size)) return false;
        is_cut_ = size > rest_.size();
        bytes_ = rest_.substr(0, is_cut_ ? rest_.size() : static_cast<size_t>(size));
        rest_.remove_prefix(bytes_.size());
        return true;
      }
    }
    return Break();
  }

  bool Is(uint32_t field, Type type) const { return field_ == field && type_ == type; }
  bool IsBytes(uint32_t field) const { return Is(field, Type::kBytes); }
  bool IsNumber(uint32_t field) const { return Is(field, Type::kVarint); }
  std::string_view bytes() const { return bytes_; }
  uint64_t number() const { return number_; }
  bool is_cut() const { return is_cut_; }
  bool is_broken() const { return is_broken_; }

  // One varint off the front of `data`; false if it is cut or longer than 64 bits.
  static bool TakeVarint(std::string_view* data, uint64_t* value) {
    uint64_t result = 0;
    for (size_t i = 0; i < data->size() && i < 10; ++i) {
      auto byte = static_cast<uint8_t>((*data)[i]);
      result |= static_cast<uint64_t>(byte & 0x7F) << (7 * i);
      if (byte < 0x80) {
        data->remove_prefix(i + 1);
        *value = result;
        return true;
      }
    }
    return false;
  }

 private:
  bool Break() {
    is_broken_ = true;
    return false;
  }
  bool Varint(uint64_t* value) {
    if (TakeVarint(&rest_, value)) return true;
    (rest_.size() < 10 ? is_cut_ : is_broken_) = true;
    return false;
  }
  bool Skip(size_t size) {
    is_cut_ = rest_.size() < size;
    rest_.remove_prefix(is_cut_ ? rest_.size() : size);
    return !is_cut_;
  }

  std::string_view rest_;
  std::string_view bytes_;
  uint64_t number_ = 0;
  uint32_t field_ = 0;
  Type type_ = Type::kVarint;
  bool is_cut_ = false;
  bool is_broken_ = false;
};

}  // namespace twinjet::epp
