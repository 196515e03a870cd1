// MsgpackReader: walks over one msgpack value after the other, without copies and without recursion.
//
// Each Read takes the next value and throws WireError if it is of another type or reaches beyond the end.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "vllm/core_outputs.h"

namespace twinjet::vllm {

class MsgpackReader {
 public:
  explicit MsgpackReader(Frame frame) : at_(frame.data()), end_(frame.data() + frame.size()) {}

  // Takes a nil if one is next.
  bool TakeNil() {
    if (Peek() != 0xc0) return false;
    ++at_;
    return true;
  }

  bool NextIsInt() {
    const uint8_t byte = Peek();
    return byte <= 0x7f || byte >= 0xe0 || (byte >= 0xcc && byte <= 0xd3);
  }

  uint32_t ReadArray() {
    const uint8_t byte = Take();
    if ((byte & 0xf0) == 0x90) return byte & 0x0f;
    if (byte == 0xdc) return static_cast<uint32_t>(Big(2));
    if (byte == 0xdd) return static_cast<uint32_t>(Big(4));
    throw WireError("an array was expected");
  }

  uint32_t ReadMap() {
    const uint8_t byte = Take();
    if ((byte & 0xf0) == 0x80) return byte & 0x0f;
    if (byte == 0xde) return static_cast<uint32_t>(Big(2));
    if (byte == 0xdf) return static_cast<uint32_t>(Big(4));
    throw WireError("a map was expected");
  }

  int64_t ReadInt() {
    const uint8_t byte = Take();
    if (byte <= 0x7f) return byte;
    if (byte >= 0xe0) return static_cast<int8_t>(byte);
    switch (byte) {
      case 0xcc:
        return static_cast<int64_t>(Big(1));
      case 0xcd:
        return static_cast<int64_t>(Big(2));
      case 0xce:
        return static_cast<int64_t>(Big(4));
      case 0xcf: {
        const uint64_t value = Big(8);
        if (value > INT64_MAX) throw WireError("an integer is too large");
        return static_cast<int64_t>(value);
      }
      case 0xd0:
        return static_cast<int8_t>(Big(1));
      case 0xd1:
        return static_cast<int16_t>(Big(2));
      case 0xd2:
        return static_cast<int32_t>(Big(4));
      case 0xd3:
        return static_cast<int64_t>(Big(8));
      default:
        throw WireError("an integer was expected");
    }
  }

  double ReadNumber() {
    const uint8_t byte = Peek();
    if (byte == 0xcb) {
      ++at_;
      return std::bit_cast<double>(Big(8));
    }
    if (byte == 0xca) {
      ++at_;
      return std::bit_cast<float>(static_cast<uint32_t>(Big(4)));
    }
    return static_cast<double>(ReadInt());
  }

  std::string_view ReadText() {
    const uint8_t byte = Take();
    size_t size = 0;
    if ((byte & 0xe0) == 0xa0) {
      size = byte & 0x1f;
    } else if (byte >= 0xd9 && byte <= 0xdb) {
      size = static_cast<size_t>(Big(1 << (byte - 0xd9)));
    } else {
      throw WireError("a text was expected");
    }
    const Frame bytes = Bytes(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  // The content of binary data or of an extension, of whatever type.
  Frame ReadBinary() {
    const uint8_t byte = Take();
    size_t size = 0;
    bool is_extension = true;
    if (byte >= 0xd4 && byte <= 0xd8) {
      size = size_t{1} << (byte - 0xd4);
    } else if (byte >= 0xc7 && byte <= 0xc9) {
      size = static_cast<size_t>(Big(1 << (byte - 0xc7)));
    } else if (byte >= 0xc4 && byte <= 0xc6) {
      size = static_cast<size_t>(Big(1 << (byte - 0xc4)));
      is_extension = false;
    } else {
      throw WireError("binary data was expected");
    }
    if (is_extension) Take();
    return Bytes(size);
  }

  // Passes over one value, with all that is in it.
  void Skip() {
    for (uint64_t left = 1; left > 0; --left) {
      const uint8_t byte = Peek();
      if (byte <= 0x7f || byte >= 0xe0 || byte == 0xc0 || byte == 0xc2 || byte == 0xc3) {
        ++at_;
      } else if ((byte & 0xf0) == 0x90 || byte == 0xdc || byte == 0xdd) {
        left += ReadArray();
      } else if ((byte & 0xf0) == 0x80 || byte == 0xde || byte == 0xdf) {
        left += 2 * uint64_t{ReadMap()};
      } else if ((byte & 0xe0) == 0xa0 || (byte >= 0xd9 && byte <= 0xdb)) {
        ReadText();
      } else if (byte == 0xca || byte == 0xcb) {
        ReadNumber();
      } else if (byte >= 0xcc && byte <= 0xd3) {
        ++at_;
        Bytes(size_t{1} << ((byte - 0xcc) & 3));
      } else {
        ReadBinary();
      }
    }
  }

  void Skip(uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) Skip();
  }

  bool is_done() const { return at_ == end_; }

 private:
  uint8_t Peek() const {
    if (at_ == end_) throw WireError("the message ends early");
    return *at_;
  }
  uint8_t Take() {
    const uint8_t byte = Peek();
    ++at_;
    return byte;
  }
  Frame Bytes(size_t size) {
    if (static_cast<size_t>(end_ - at_) < size) throw WireError("the message ends early");
    const Frame bytes(at_, size);
    at_ += size;
    return bytes;
  }
  uint64_t Big(size_t size) {
    uint64_t value = 0;
    for (const uint8_t byte : Bytes(size)) value = value << 8 | byte;
    return value;
  }

  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace twinjet::vllm
