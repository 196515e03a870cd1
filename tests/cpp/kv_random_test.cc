// A million random calls against a simulated KV cache. Each slot of each block holds a digest of the
// tokens up to it, as real keys and values depend on them; a sequence's slots must hold its own
// prefix's digests at all times. That catches a block handed out twice, a wrong hit, a missed copy.
#include <unordered_map>

#include "check.h"
#include "kv/block_manager.h"

using namespace twinjet::kv;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kSteps = 200000;
#else
constexpr int kSteps = 1000000;
#endif

class Simulation {
 public:
  Simulation(const ManagerOptions& options, std::mt19937_64 random)
      : manager_(options),
        random_(random),
        block_size_(static_cast<size_t>(options.block_size)),
        slots_(static_cast<size_t>(options.num_blocks) * block_size_) {}

  void Step() {
    switch (Below(12)) {
      case 0:
      case 1:
        Allocate();
        break;
      case 2:
        Append();
        break;
      case 3:
      case 4:
      case 5:
        AppendBatch();
        break;
      case 6:
        Fork();
        break;
      case 7:
        ReserveExternal();
        break;
      case 8:
      case 9:
        Drop();
        break;
      case 10:
        Evict();
        break;
      default:
        if (Below(50) == 0) manager_.Reset();
        GiveBack();
    }
    std::string wrong = manager_.Check();
    if (!wrong.empty()) test::Fail(__FILE__, __LINE__, wrong);
  }

  void VerifyContents() const {
    for (const auto& [id, tokens] : live_) VerifySequence(id, tokens);
  }
  uint64_t num_hits() const { return manager_.stats().num_hits + num_external_hits_; }
  uint64_t num_evicted() const { return manager_.stats().num_evicted_blocks; }
  uint64_t num_failed() const { return manager_.stats().num_failed; }
  uint64_t num_forks() const { return num_forks_; }

 private:
  using Tokens = std::vector<int32_t>;

  size_t Below(size_t n) { return random_() % n; }
  Tokens RandomPrompt() {
    // Drawn from few families, so prefixes recur.
    Tokens tokens(1 + Below(6 * block_size_));
    auto family = static_cast<int32_t>(Below(3));
    size_t diverges = Below(tokens.size() + 4);
    for (size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = i < diverges ? family : static_cast<int32_t>(Below(2));
    return tokens;
  }
  SequenceId Any() {
    auto it = live_.begin();
    std::advance(it, static_cast<ptrdiff_t>(Below(live_.size())));
    return it->first;
  }
  std::vector<BlockHash> Hashes(const Tokens& tokens) const {
    std::vector<BlockHash> hashes(tokens.size() / block_size_);
    manager_.hasher().HashBlocks(manager_.hasher().Root({}), tokens.data(), hashes);
    return hashes;
  }

  static std::vector<uint64_t> Digests(const Tokens& tokens) {
    std::vector<uint64_t> digests;
    uint64_t digest = 0;
    for (int32_t token : tokens) {
      digest = (digest ^ static_cast<uint64_t>(token + 1)) * 0x100000001b3 + 0x9e3779b97f4a7c15;
      digests.push_back(digest);
    }
    return digests;
  }
  uint64_t& Slot(SequenceId id, size_t position) {
    BlockId block = manager_.FindSequence(id)->table.data()[position / block_size_];
    return slots_[static_cast<size_t>(block) * block_size_ + position % block_size_];
  }
  // What a forward pass does: fills the slots of tokens not cached.
  void Write(SequenceId id, size_t first, const Tokens& tokens) {
    std::vector<uint64_t> digests = Digests(tokens);
    for (size_t i = first; i < tokens.size(); ++i) Slot(id, i) = digests[i];
  }
  void VerifySequence(SequenceId id, const Tokens& tokens) const {
    std::vector<uint64_t> digests = Digests(tokens);
    for (size_t i = 0; i < tokens.size(); ++i) {
      CHECK_EQ(const_cast<Simulation*>(this)->Slot(id, i), digests[i]);
    }
  }

  void Allocate() {
    Tokens tokens = RandomPrompt();
    SequenceId id;
    AllocateOptions options{.num_lookahead_tokens = static_cast<int64_t>(Below(3)),
                            .headroom = {.reserved_blocks = static_cast<int64_t>(Below(3))}};
    Status status = manager_.Allocate(tokens, Hashes(tokens), manager_.hasher().Root({}), options, &id);
    CHECK(status == Status::kOk || status == Status::kNoRoom);
    if (status != Status::kOk) return;
    Write(id, static_cast<size_t>(manager_.FindSequence(id)->num_cached_tokens), tokens);
    VerifySequence(id, tokens);
    live_[id] = tokens;
  }

  void Append() {
    if (live_.empty()) return;
    SequenceId id = Any();
    Tokens added(1 + Below(2 * block_size_));
    for (int32_t& token : added) token = static_cast<int32_t>(Below(2));
    std::vector<BlockId> blocks;
    Status status = manager_.Append(id, added, &blocks);
    CHECK(status == Status::kOk || status == Status::kNoRoom || status == Status::kNeverFits);
    if (status != Status::kOk) return;
    Tokens& tokens = live_[id];
    size_t first = tokens.size();
    tokens.insert(tokens.end(), added.begin(), added.end());
    Write(id, first, tokens);
  }

  void AppendBatch() {
    std::vector<SequenceId> ids;
    std::vector<int32_t> added;
    for (const auto& [id, tokens] : live_) {
      if (Below(4) == 0) continue;
      ids.push_back(id);
      added.push_back(static_cast<int32_t>(Below(2)));
    }
    std::vector<BlockId> blocks(ids.size());
    Status status = manager_.AppendBatch(ids, added.data(), blocks.data());
    CHECK(status == Status::kOk || status == Status::kNoRoom || status == Status::kNeverFits);
    if (status != Status::kOk) return;
    for (size_t i = 0; i < ids.size(); ++i) {
      Tokens& tokens = live_[ids[i]];
      tokens.push_back(added[i]);
      Write(ids[i], tokens.size() - 1, tokens);
    }
  }

  void Fork() {
    if (live_.empty()) return;
    SequenceId id = Any(), child;
    BlockCopy copy;
    if (manager_.Fork(id, &child, &copy) != Status::kOk) return;
    if (copy.source != kNoBlock) {
      auto at = [&](BlockId block) { return slots_.begin() + static_cast<ptrdiff_t>(block * block_size_); };
      std::copy_n(at(copy.source), block_size_, at(copy.destination));
    }
    live_[child] = live_[id];
    ++num_forks_;
  }

  // As an engine does that keeps tokens and hashes itself: match, adopt, compute, publish.
  void ReserveExternal() {
    Tokens tokens = RandomPrompt();
    std::vector<BlockHash> hashes = Hashes(tokens);
    std::vector<BlockId> matched(hashes.size());
    auto limit = (tokens.size() - 1) / block_size_;
    matched.resize(static_cast<size_t>(manager_.Match(std::span(hashes).first(limit), matched.data())));
    SequenceId id;
    int64_t num_new;
    CHECK_EQ(manager_.Open(&id), Status::kOk);
    if (manager_.Reserve(id, static_cast<int64_t>(tokens.size()), matched, {}, &num_new) != Status::kOk) {
      CHECK_EQ(manager_.Free(id), Status::kOk);
      return;
    }
    num_external_hits_ += !matched.empty();
    auto hash_of = [&](int64_t i) { return hashes[static_cast<size_t>(i)]; };
    Status status = manager_.PublishHashes(*manager_.FindSequence(id), static_cast<int64_t>(tokens.size()),
                                           static_cast<int64_t>(hashes.size()), hash_of, &num_new);
    CHECK_EQ(status, Status::kOk);
    Write(id, matched.size() * block_size_, tokens);
    VerifySequence(id, tokens);
    live_[id] = tokens;
  }

  void Drop() {
    if (live_.empty()) return;
    SequenceId id = Any();
    VerifySequence(id, live_[id]);
    if (Below(4) == 0) {
      std::vector<BlockId> blocks;
      CHECK_EQ(manager_.Detach(id, &blocks), Status::kOk);
      detached_.insert(detached_.end(), blocks.rbegin(), blocks.rend());
    } else {
      CHECK_EQ(manager_.Free(id), Status::kOk);
    }
    CHECK_EQ(manager_.Free(id), Status::kUnknownSequence);
    live_.erase(id);
  }

  void GiveBack() {
    CHECK_EQ(manager_.FreeBlocks(detached_), Status::kOk);
    detached_.clear();
  }

  void Evict() {
    std::vector<BlockId> blocks = {static_cast<BlockId>(Below(static_cast<size_t>(manager_.num_blocks())))};
    int64_t num_evicted;
    manager_.Evict(blocks, &num_evicted);
  }

  BlockManager manager_;
  std::mt19937_64 random_;
  size_t block_size_;
  std::vector<uint64_t> slots_;
  std::unordered_map<SequenceId, Tokens> live_;
  std::vector<BlockId> detached_;
  uint64_t num_forks_ = 0;
  uint64_t num_external_hits_ = 0;
};

void RunSimulation(const ManagerOptions& options, int num_steps, uint64_t stream) {
  Simulation simulation(options, test::Random(stream));
  for (int step = 0; step < num_steps; ++step) {
    simulation.Step();
    if (step % 64 == 0) simulation.VerifyContents();
  }
  // A run that never reached these would prove little.
  CHECK(simulation.num_forks() > 100);
  CHECK(simulation.num_failed() > 100);
  if (options.prefix_cache) {
    CHECK(simulation.num_hits() > 100);
    CHECK(simulation.num_evicted() > 100);
  }
}

}  // namespace

TEST(random_calls_never_corrupt_a_sequence) {
  RunSimulation({.num_blocks = 24, .block_size = 4, .max_events = 8}, kSteps / 2, 1);
  RunSimulation({.num_blocks = 17, .block_size = 1, .null_block = true}, kSteps / 4, 2);
  RunSimulation({.num_blocks = 40, .block_size = 16, .algorithm = BlockHasher::Algorithm::kSipHash},
                kSteps / 8, 3);
  RunSimulation({.num_blocks = 24, .block_size = 2, .prefix_cache = false}, kSteps / 8, 4);
}
