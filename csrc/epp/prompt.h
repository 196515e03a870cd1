// Prompt: what of a request for an answer bears on where it should go, read from the request's own bytes.
//
// Its beginning is told by block hashes over 32-bit words: token ids as they are, or four bytes of text each,
// which is about a token. What separates caches (model, adapter, salt) enters the root, so equal hashes mean
// a shared prefix.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kv/block_hash.h"

namespace twinjet::epp {

enum class Method : uint8_t { kGenerate, kChat };

struct Prompt {
  std::string model;
  std::string tenant;
  std::string cache_salt;
  std::string adapter;
  int32_t priority = 0;
  bool has_token_ids = false;
  int64_t num_tokens = 0;      // of the prompt: exact for token ids, a quarter of the bytes for text
  std::vector<int32_t> words;  // token ids, or text in words; text is padded with zeros
  size_t num_text_bytes = 0;

  // Hashes of the full blocks of `words`. hasher must outlive nothing.
  std::vector<kv::BlockHash> Hashes(const kv::BlockHasher& hasher) const;

 private:
  friend bool ReadPrompt(std::string_view, Method, Prompt*);
  Method method_ = Method::kGenerate;
};

// Reads a twinjet.v1.GenerateRequest or ChatRequest. One that ends early gives what is there; false where the
// bytes are no such message.
bool ReadPrompt(std::string_view message, Method method, Prompt* prompt);

}  // namespace twinjet::epp
