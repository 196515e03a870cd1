#include "requests/plain_generate.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "stream/utf8.h"

namespace twinjet::requests {
namespace {

constexpr size_t kDrawnBytes = 4096;
constexpr size_t kIdBytes = 12;
constexpr int kSeedBits = 53;

// GenerateRequest, RequestOptions.
enum Field : uint32_t { kModel = 1, kText = 2, kTokenIds = 3, kSampling = 4, kOptions = 5 };
enum Option : uint32_t { kRequestId = 1, kTenant = 3, kCacheSalt = 4, kSession = 7 };

// A number of more than five bytes is negative or none, and of ten protobuf has rules of its own.
bool ReadTokenIds(std::string_view packed, PlainGenerate* plain) {
  plain->token_ids.reserve(packed.size() / 2);
  const auto* at = reinterpret_cast<const uint8_t*>(packed.data());
  const auto* const end = at + packed.size();
  while (at < end) {
    uint64_t value = 0;
    int shift = 0;
    while (true) {
      if (at == end || shift > 28) return false;
      const uint8_t byte = *at++;
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) break;
      shift += 7;
    }
    if (value > INT32_MAX) return false;
    plain->token_ids.push_back(static_cast<int32_t>(value));
    plain->largest_token = std::max(plain->largest_token, static_cast<int32_t>(value));
  }
  return true;
}

bool ReadLabel(std::string_view bytes, std::string_view* label) {
  *label = bytes;
  return bytes.size() <= kMaxLabelBytes && stream::IsUtf8(bytes);
}

// The length-delimited fields of a message, each number once and below 16, in the shortest encoding; anything
// else makes it not plain.
class PlainFields {
 public:
  explicit PlainFields(std::string_view message) : rest_(message) {}

  bool Next() {
    if (rest_.size() < 2) return false;
    const auto tag = static_cast<uint8_t>(rest_.front());
    constexpr uint8_t kLengthDelimited = 2;
    field_ = tag >> 3;
    if (tag >= 0x80 || (tag & 7) != kLengthDelimited || (seen_ >> field_ & 1) != 0) return false;
    seen_ |= uint32_t{1} << field_;
    size_t size = 0;
    size_t at = 1;
    for (int shift = 0;; shift += 7) {
      if (at == rest_.size() || shift > 21) return false;
      const auto byte = static_cast<uint8_t>(rest_[at++]);
      size |= static_cast<size_t>(byte & 0x7F) << shift;
      if (byte >= 0x80) continue;
      if (byte == 0 && shift > 0) return false;
      break;
    }
    if (size > rest_.size() - at) return false;
    bytes_ = rest_.substr(at, size);
    rest_.remove_prefix(at + size);
    return true;
  }

  uint32_t field() const { return field_; }
  std::string_view bytes() const { return bytes_; }
  // Whether all of the message was fields of this kind.
  bool is_done() const { return rest_.empty(); }

 private:
  std::string_view rest_;
  std::string_view bytes_;
  uint32_t field_ = 0;
  uint32_t seen_ = 0;
};

bool ReadOptions(std::string_view message, PlainGenerate* plain) {
  PlainFields fields(message);
  while (fields.Next()) {
    const std::string_view bytes = fields.bytes();
    bool is_good = false;
    switch (fields.field()) {
      case kRequestId:
        plain->request_id = bytes;
        is_good = IsRequestId(bytes);
        break;
      case kTenant:
        is_good = ReadLabel(bytes, &plain->tenant);
        break;
      case kCacheSalt:
        is_good = ReadLabel(bytes, &plain->cache_salt);
        break;
      case kSession:
        is_good = ReadLabel(bytes, &plain->session);
        break;
      default:
        break;
    }
    if (!is_good) return false;
  }
  return fields.is_done();
}

}  // namespace

std::optional<PlainGenerate> ReadPlainGenerate(std::string_view message) {
  if (message.size() > kMaxPlainBytes) return std::nullopt;
  PlainGenerate plain;
  PlainFields fields(message);
  while (fields.Next()) {
    const std::string_view bytes = fields.bytes();
    bool is_good = false;
    switch (fields.field()) {
      case kModel:
        plain.model = bytes;
        is_good = stream::IsUtf8(bytes);
        break;
      case kText:
        plain.text = bytes;
        is_good = stream::IsUtf8(bytes);
        break;
      case kTokenIds:
        is_good = ReadTokenIds(bytes, &plain);
        break;
      case kSampling:
        plain.sampling = bytes;
        is_good = true;
        break;
      case kOptions:
        is_good = ReadOptions(bytes, &plain);
        break;
      default:
        break;
    }
    if (!is_good) return std::nullopt;
  }
  if (!fields.is_done()) return std::nullopt;
  if (plain.text.empty() == plain.token_ids.empty()) return std::nullopt;
  return plain;
}

bool IsRequestId(std::string_view id) {
  return id.size() <= kMaxIdChars &&
         std::all_of(id.begin(), id.end(), [](char c) { return c >= '!' && c <= '~'; });
}

std::string_view Lots::Draw(size_t num_bytes) {
  if (drawn_.size() - pos_ < num_bytes) {
    drawn_.resize(kDrawnBytes);
    size_t num_have = 0;
    while (num_have < drawn_.size()) {
      const ssize_t got = getrandom(drawn_.data() + num_have, drawn_.size() - num_have, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw std::system_error(errno, std::generic_category(), "getrandom");
      num_have += static_cast<size_t>(got);
    }
    pos_ = 0;
  }
  const std::string_view piece = std::string_view(drawn_).substr(pos_, num_bytes);
  pos_ += num_bytes;
  return piece;
}

std::string Lots::DrawId(std::string_view prefix) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string id;
  if (!prefix.empty()) {
    id.assign(prefix.substr(0, kMaxIdChars - 2 * kIdBytes - 1));
    id.push_back('-');
  }
  for (const char byte : Draw(kIdBytes)) {
    id.push_back(kDigits[static_cast<uint8_t>(byte) >> 4]);
    id.push_back(kDigits[byte & 0xF]);
  }
  return id;
}

uint64_t Lots::DrawSeed() {
  uint64_t seed = 0;
  std::memcpy(&seed, Draw(sizeof seed).data(), sizeof seed);
  return seed >> (64 - kSeedBits);
}

}  // namespace twinjet::requests
