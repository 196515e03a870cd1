// What one sequence needs between steps: its parameters, its output tokens, and how often each token
// occurred, kept so that a step costs nothing that grows with the length of the text.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "sampler/row.h"
#include "sampler/spec.h"

namespace twinjet::sampler {

class BadText;

// A request that the specification does not allow; what() says which value and what is allowed.
class InvalidRequest : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct RequestOptions {
  RowParams params;                           // position is ignored: the request counts
  int64_t position_offset = 0;                // >= 0: position of the first output token
  std::span<const int32_t> prompt_token_ids;  // needed for the repetition penalty only
  std::span<const int32_t> output_token_ids;  // when a sequence is taken up midway
  std::vector<TokenBias> biases;              // finite, each token once
  bool has_allowed = false;                   // true with an empty list: no token is admissible
  std::span<const int32_t> allowed_token_ids;
  std::vector<std::vector<int32_t>> bad_words;  // token sequences that must not be completed
  std::shared_ptr<const BadText> bad_text;      // strings that must not be completed; may be null
  int64_t min_tokens = 0;                       // stop tokens are masked before this many outputs
  std::vector<int32_t> stop_token_ids;
};

class Request {
 public:
  // Throws InvalidRequest. Borrows nothing. Prompt tokens outside the vocabulary (placeholders of
  // other modalities) are passed over; every other token id must lie within it.
  Request(int32_t vocab_size, const RequestOptions& options);

  // The token at `position()` was drawn. Throws InvalidRequest outside the vocabulary.
  void Append(int32_t token_id);

  // Takes back all output tokens but the first num_output_tokens.
  void Truncate(size_t num_output_tokens);

  // Constants and edits for the next token; they borrow from this object until it changes.
  RowConstants Constants() const;
  RowEdits Edits();

  int32_t vocab_size() const { return vocab_size_; }
  const RowParams& params() const { return params_; }
  // Whether some of Edits().banned depend on the text of the output so far.
  bool has_bad_text() const { return bad_text_ != nullptr; }
  const std::shared_ptr<const BadText>& bad_text() const { return bad_text_; }
  // The end of the output's text, as far as bad_text() asks for it.
  const std::string& tail() const { return tail_; }
  bool is_greedy() const { return constants_.is_greedy != 0; }
  uint64_t position() const { return position_offset_ + output_token_ids_.size(); }
  const std::vector<int32_t>& output_token_ids() const { return output_token_ids_; }
  const std::vector<std::vector<int32_t>>& bad_words() const { return bad_words_; }
  size_t min_tokens() const { return min_tokens_; }
  const std::vector<int32_t>& stop_token_ids() const { return stop_token_ids_; }
  // Whether a penalty asks how often each token was drawn.
  bool counts_output() const { return counts_output_; }

 private:
  void CheckToken(int32_t token_id, const char* what) const;
  TokenUse* UseOf(int32_t token_id);
  bool EndsWith(std::span<const int32_t> tokens) const;
  void MaskBadText();
  void AddText(int32_t token_id);

  int32_t vocab_size_;
  RowParams params_;
  RowConstants constants_;
  uint64_t position_offset_;
  bool counts_prompt_;
  bool counts_output_;
  std::vector<int32_t> output_token_ids_;
  std::vector<TokenUse> uses_;
  std::unordered_map<int32_t, size_t> use_places_;
  std::vector<TokenBias> biases_;
  std::vector<uint32_t> allowed_mask_;
  std::vector<std::vector<int32_t>> bad_words_;
  std::vector<int32_t> banned_;
  std::shared_ptr<const BadText> bad_text_;
  std::string tail_;
  size_t min_tokens_;
  std::vector<int32_t> stop_token_ids_;
};

}  // namespace twinjet::sampler
