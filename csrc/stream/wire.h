// Writes protobuf's wire format: the few kinds of fields that the contract's responses have. A caller gives
// fields in the order of their numbers and leaves out what is at its default, as protobuf's serializers do.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace twinjet::stream {

constexpr size_t VarintSize(uint64_t value) {
  return (static_cast<size_t>(std::bit_width(value | 1)) + 6) / 7;
}

// Sign-extended, as int32 fields are.
constexpr uint64_t Int32Bits(int32_t value) { return static_cast<uint64_t>(int64_t{value}); }

class WireWriter {
 public:
  explicit WireWriter(std::string* out) : out_(out) {}

  void Varint(uint64_t value) {
    while (value >= 0x80) {
      out_->push_back(static_cast<char>(value | 0x80));
      value >>= 7;
    }
    out_->push_back(static_cast<char>(value));
  }
  // A scalar that is sent whatever it is: a member of a oneof, or an optional field that is set.
  void Set(uint32_t field, uint64_t value) {
    Varint(field << 3);
    Varint(value);
  }
  void Scalar(uint32_t field, uint64_t value) {
    if (value != 0) Set(field, value);
  }
  void Float(uint32_t field, float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (bits == 0) return;
    Varint(field << 3 | 5);
    for (int shift = 0; shift < 32; shift += 8) out_->push_back(static_cast<char>(bits >> shift));
  }
  void SetBytes(uint32_t field, std::string_view bytes) {
    Begin(field, bytes.size());
    out_->append(bytes);
  }
  void Bytes(uint32_t field, std::string_view bytes) {
    if (!bytes.empty()) SetBytes(field, bytes);
  }
  void PackedInt32(uint32_t field, std::span<const int32_t> values) {
    if (values.empty()) return;
    size_t size = 0;
    for (int32_t value : values) size += VarintSize(Int32Bits(value));
    Begin(field, size);
    for (int32_t value : values) Varint(Int32Bits(value));
  }
  // The head of a message of `size` bytes, which the caller writes next.
  void Begin(uint32_t field, size_t size) {
    Varint(field << 3 | 2);
    Varint(size);
  }

 private:
  std::string* out_;
};

}  // namespace twinjet::stream
