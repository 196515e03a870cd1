// gRPC's text and binary encodings over HTTP/2. Pure functions over untrusted input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace twinjet::door {

inline constexpr size_t kPrefixBytes = 5;  // of a message: a flag and a length

// Writes a message's prefix to out[0..4].
void PutPrefix(bool is_compressed, uint32_t num_bytes, char* out);

// The nanoseconds of a grpc-timeout ("100m", "5S"), or nothing if it is not one.
std::optional<int64_t> ParseTimeout(std::string_view text);

// A grpc-message: UTF-8 with everything but printable ASCII, and '%', as %XX.
std::string PercentEncode(std::string_view text);
std::string PercentDecode(std::string_view text);  // what is not %XX stays as it is

std::string Base64Encode(std::string_view bytes);  // without padding
// With or without padding; nothing if text has other characters or an impossible length.
std::optional<std::string> Base64Decode(std::string_view text);

bool IsBinaryKey(std::string_view key);  // ends in "-bin"
bool IsMetadataKey(std::string_view key);
bool IsAsciiValue(std::string_view value);  // 0x20 to 0x7e

enum class Encoding : uint8_t { kIdentity, kGzip, kDeflate, kUnknown };
Encoding ParseEncoding(std::string_view name);
bool AcceptsGzip(std::string_view accept_encoding);

std::string Gzip(std::string_view bytes);
// Nothing if bytes are not gzip or zlib data, or if more than max_bytes come out (*is_too_large then).
std::optional<std::string> Inflate(std::string_view bytes, size_t max_bytes, bool* is_too_large);

}  // namespace twinjet::door
