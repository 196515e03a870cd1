// Messages of vLLM's engine core, made by hand.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace vllm_messages {

// The id of the request with a key.
inline std::string IdOf(uint64_t key) {
  char id[32];
  std::snprintf(id, sizeof id, "r-%llx", static_cast<unsigned long long>(key));
  return id;
}

inline std::string Text(const std::string& text) {
  return std::string(1, static_cast<char>(0xa0 | text.size())) + text;
}

// One output with tokens 7 and 300, and what `rest` says of the 16 fields behind them.
inline std::string Output(const std::string& id, const std::string& rest) {
  return std::string("\xdc\x00\x12", 3) + Text(id) + std::string("\x92\x07\xcd\x01\x2c", 5) + rest;
}

inline std::string Nils(size_t count) { return std::string(count, '\xc0'); }

inline std::string Message(const std::vector<std::string>& outputs, const std::string& stats) {
  const size_t count = outputs.size();
  std::string made("\x99\x00", 2);
  if (count < 16) {
    made += static_cast<char>(0x90 | count);
  } else {
    made += {'\xdc', static_cast<char>(count >> 8), static_cast<char>(count)};
  }
  for (const std::string& output : outputs) made += output;
  return made + stats + std::string("\xcb\0\0\0\0\0\0\0\0", 9) + Nils(5);
}

inline const std::string kStats = "\x82" + Text("num_running_reqs") + "\x05" + Text("kv_cache_usage") +
                                  std::string("\xcb\x3f\xe0\0\0\0\0\0\0", 9);
// A step of one that goes on.
inline const std::string kRunning = Nils(11) + std::string(1, 0) + Nils(4);
// finish_reason 1, then nil up to prefill_stats with five cached tokens.
inline const std::string kFinished = Nils(3) + "\x01" + Nils(5) + "\x81" + Text("num_cached_tokens") +
                                     "\x05" + Nils(1) + std::string(1, 0) + Nils(4);

}  // namespace vllm_messages
