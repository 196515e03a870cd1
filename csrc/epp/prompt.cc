#include "epp/prompt.h"

#include <cstring>

#include "epp/wire_reader.h"
#include "kv/sha256.h"

namespace twinjet::epp {
namespace {

// Bytes that no UTF-8 text has.
constexpr char kEndOfPart = '\xff';
constexpr char kMedium = '\xfe';

// RequestOptions
bool ReadOptions(std::string_view data, Prompt* prompt) {
  WireReader reader(data);
  while (reader.Next()) {
    if (reader.IsNumber(2)) prompt->priority = static_cast<int32_t>(reader.number());
    if (reader.IsBytes(3)) prompt->tenant = reader.bytes();
    if (reader.IsBytes(4)) prompt->cache_salt = reader.bytes();
    if (reader.IsBytes(5)) prompt->adapter = reader.bytes();
  }
  return !reader.is_broken();
}

bool ReadPackedIds(std::string_view data, std::vector<int32_t>* ids) {
  ids->reserve(ids->size() + data.size() / 2);
  while (!data.empty()) {
    uint64_t value = 0;
    if (!WireReader::TakeVarint(&data, &value)) return data.size() < 10;
    ids->push_back(static_cast<int32_t>(value));
  }
  return true;
}

// ChatMessage. The end of a part is marked behind it, so that a longer text begins with the same bytes.
bool ReadMessage(std::string_view data, std::string* text) {
  WireReader reader(data);
  std::string_view role;
  std::string_view content;
  std::string media;
  while (reader.Next()) {
    if (reader.IsBytes(1)) role = reader.bytes();
    if (reader.IsBytes(2)) content = reader.bytes();
    if (reader.IsBytes(3) || reader.IsBytes(4)) {
      auto bytes = reinterpret_cast<const uint8_t*>(reader.bytes().data());
      auto digest = kv::Sha256(kv::BestSha256Target()).Update({bytes, reader.bytes().size()}).Finish();
      media += kMedium;
      media.append(reinterpret_cast<const char*>(digest.data()), kv::BlockHash::kBytes);
    }
  }
  text->append(role) += kEndOfPart;
  text->append(media).append(content);
  if (!reader.is_cut()) *text += kEndOfPart;
  return !reader.is_broken();
}

void AddPart(std::string_view part, std::string* root) {
  auto size = static_cast<uint32_t>(part.size());
  root->append(reinterpret_cast<const char*>(&size), sizeof(size)).append(part);
}

}  // namespace

bool ReadPrompt(std::string_view message, Method method, Prompt* prompt) {
  prompt->method_ = method;
  WireReader reader(message);
  std::string text;
  bool is_chat = method == Method::kChat;
  uint32_t options_field = is_chat ? 4 : 5;
  while (reader.Next()) {
    bool is_sound = true;
    if (reader.IsBytes(1)) {
      prompt->model = reader.bytes();
    } else if (reader.IsBytes(options_field)) {
      is_sound = ReadOptions(reader.bytes(), prompt);
    } else if (reader.IsBytes(2)) {
      if (is_chat) {
        is_sound = ReadMessage(reader.bytes(), &text);
      } else {
        text = reader.bytes();
      }
    } else if (!is_chat && reader.IsBytes(3)) {
      is_sound = ReadPackedIds(reader.bytes(), &prompt->words);
    } else if (!is_chat && reader.IsNumber(3)) {
      prompt->words.push_back(static_cast<int32_t>(reader.number()));
    }
    if (!is_sound) return false;
  }
  if (reader.is_broken()) return false;
  prompt->has_token_ids = !prompt->words.empty();
  if (prompt->has_token_ids) {
    prompt->num_tokens = static_cast<int64_t>(prompt->words.size());
    return true;
  }
  prompt->num_text_bytes = text.size();
  prompt->words.resize((text.size() + 3) / 4);
  if (!text.empty()) std::memcpy(prompt->words.data(), text.data(), text.size());
  prompt->num_tokens = static_cast<int64_t>(prompt->words.size());
  return true;
}

std::vector<kv::BlockHash> Prompt::Hashes(const kv::BlockHasher& hasher) const {
  size_t num_words = has_token_ids ? words.size() : num_text_bytes / sizeof(int32_t);
  std::vector<kv::BlockHash> hashes(num_words / static_cast<size_t>(hasher.block_size()));
  if (hashes.empty()) return hashes;
  std::string root(1, has_token_ids ? 'i' : method_ == Method::kChat ? 'c' : 't');
  AddPart(model, &root);
  AddPart(adapter, &root);
  AddPart(cache_salt, &root);
  kv::BlockHash parent = hasher.Root({reinterpret_cast<const uint8_t*>(root.data()), root.size()});
  hasher.HashBlocks(parent, words.data(), hashes);
  return hashes;
}

}  // namespace twinjet::epp
