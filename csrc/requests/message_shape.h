// MessageShape: counts the values of a protobuf message without parsing it.
//
// A few bytes can hold an empty string, a message or a number, which a parsed message needs 16 to 100 bytes
// for: what a large request holds is bounded here, in one pass, before anybody pays for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace twinjet::requests {

// What a field's bytes are if they are length-delimited: packed numbers, or a message (index of its type, 0
// or more).
enum FieldKind : int32_t { kPackedVarints = -1, kPacked4 = -2, kPacked8 = -3 };

class MessageShape {
 public:
  // Fields of one type of message that are numbers or messages; all others are single values.
  using Type = std::vector<std::pair<uint32_t, int32_t>>;  // number, kind

  // types: the first is the message's own. Throws std::invalid_argument for an index that none has.
  explicit MessageShape(std::vector<Type> types);

  // The numbers of the fields, outermost first, that lead to the value with which a message holds more than
  // it may; none if it does not, or if it is no message. max_numbers: of fields that are numbers; max_values:
  // of all others.
  std::optional<std::vector<uint32_t>> FindExcess(std::string_view message, size_t max_values,
                                                  size_t max_numbers) const;

 private:
  std::vector<Type> types_;
};

}  // namespace twinjet::requests
