// PrefixIndex: which replicas hold which block hashes, and how deep into a prompt each of them goes.
//
// Two ways to fill it, not to be mixed in one index: Touch() supposes that a replica to which a prompt was
// sent holds it, and forgets the prompts longest unused; Store() and Erase() follow what the replica itself
// tells. Memory is bounded by max_links, a link being one block at one replica: some 80 bytes for a block
// that one replica holds, 28 for each further one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kv/types.h"

namespace twinjet::epp {

using ReplicaId = uint32_t;

// A replica that holds the first num_blocks blocks of a prompt, 1 or more.
struct Match {
  ReplicaId replica;
  uint32_t num_blocks;
};

class PrefixIndex {
 public:
  // max_links: 1 to 2^31. seed: secret, so that nobody can choose hashes that crowd one stretch of the table.
  PrefixIndex(size_t max_links, const kv::BlockHash& seed);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // Blocks that are remembered of a replica at most; none without a call. Forgets what is too much.
  void SetCapacity(ReplicaId replica, size_t max_blocks);
  // The prompt with these blocks went to the replica. What is beyond its capacity is not remembered.
  void Touch(ReplicaId replica, std::span<const kv::BlockHash> hashes);
  // The replica stored or lost one block. A full index drops what the largest replica stored first.
  void Store(ReplicaId replica, const kv::BlockHash& hash);
  void Erase(ReplicaId replica, const kv::BlockHash& hash);
  void Clear(ReplicaId replica);

  // The replicas that hold the first block, with the length of the run from there that each holds.
  void Find(std::span<const kv::BlockHash> hashes, std::vector<Match>* matches);

  size_t num_blocks() const { return num_entries_; }
  size_t num_links() const { return num_links_; }
  size_t MemoryBytes() const;
  // Whether all that must agree does; for tests.
  bool Check() const;

 private:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Holder {
    ReplicaId replica;
    uint32_t link;
  };
  // The holders of a block by replica, one of them in place.
  struct Entry {
    kv::BlockHash hash;
    uint64_t signature = 0;  // of the set of holders: equal for equal sets, else different but for chance
    uint32_t count = 0;
    uint32_t capacity = 1;
    union {
      Holder one;
      Holder* many;
    };
    std::span<Holder> holders() { return {capacity > 1 ? many : &one, count}; }
    std::span<const Holder> holders() const { return {capacity > 1 ? many : &one, count}; }
  };
  // One block at one replica, in the replica's list from the longest unused to the last used.
  struct Link {
    uint32_t entry;
    ReplicaId replica;
    uint32_t older;
    uint32_t newer;
  };
  struct Replica {
    uint32_t oldest = kNone;
    uint32_t newest = kNone;
    size_t num_links = 0;
    size_t capacity = 0;
    uint64_t mark = 0;  // the step of Find() that saw it last
  };
  struct Slot {
    uint32_t tag = 0;
    uint32_t entry = kNone;
  };

  uint64_t Mix(const kv::BlockHash& hash) const;
  uint64_t Signature(ReplicaId replica) const;
  size_t Probe(const kv::BlockHash& hash, uint64_t mixed) const;
  uint32_t Lookup(const kv::BlockHash& hash) const;
  uint32_t AddEntry(const kv::BlockHash& hash);
  void RemoveEntry(uint32_t entry);
  void Grow();
  size_t PlaceOf(const Entry& entry, ReplicaId replica) const;
  void Use(ReplicaId replica, const kv::BlockHash& hash);
  void AddLink(ReplicaId replica, const kv::BlockHash& hash);
  void RemoveLink(uint32_t link);
  void Detach(uint32_t link);
  void Append(uint32_t link);
  void MakeRoom(ReplicaId wanting);
  Replica& At(ReplicaId replica);

  size_t max_links_;
  kv::BlockHash seed_;
  size_t mask_;
  std::vector<Slot> slots_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> free_entries_;
  std::vector<Link> links_;
  std::vector<uint32_t> free_links_;
  std::vector<Replica> replicas_;
  std::vector<ReplicaId> candidates_;  // of Find()
  size_t num_entries_ = 0;
  size_t num_links_ = 0;
  size_t many_bytes_ = 0;
  uint64_t mark_ = 0;
};

}  // namespace twinjet::epp
