#include "epp/prefix_index.h"

#include <algorithm>
#include <cstring>

namespace twinjet::epp {
namespace {

constexpr size_t kFirstSlots = 1024;

uint64_t Finalise(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

}  // namespace

PrefixIndex::PrefixIndex(size_t max_links, const kv::BlockHash& seed)
    : max_links_(max_links), seed_(seed), mask_(kFirstSlots - 1), slots_(kFirstSlots) {}

PrefixIndex::~PrefixIndex() {
  for (Entry& entry : entries_) {
    if (entry.capacity > 1) delete[] entry.many;
  }
}

uint64_t PrefixIndex::Mix(const kv::BlockHash& hash) const {
  __extension__ using Wide = unsigned __int128;
  Wide product = static_cast<Wide>(hash.lo ^ seed_.lo) * (hash.hi ^ seed_.hi);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t PrefixIndex::Signature(ReplicaId replica) const {
  return Finalise(seed_.lo + replica * seed_.hi) | 1;
}

size_t PrefixIndex::Probe(const kv::BlockHash& hash, uint64_t mixed) const {
  auto tag = static_cast<uint32_t>(mixed >> 32);
  for (size_t at = mixed & mask_;; at = (at + 1) & mask_) {
    const Slot& slot = slots_[at];
    if (slot.entry == kNone || (slot.tag == tag && entries_[slot.entry].hash == hash)) return at;
  }
}

uint32_t PrefixIndex::Lookup(const kv::BlockHash& hash) const { return slots_[Probe(hash, Mix(hash))].entry; }

uint32_t PrefixIndex::AddEntry(const kv::BlockHash& hash) {
  if (2 * (num_entries_ + 1) > slots_.size()) Grow();
  uint32_t index;
  if (free_entries_.empty()) {
    index = static_cast<uint32_t>(entries_.size());
    entries_.emplace_back();
  } else {
    index = free_entries_.back();
    free_entries_.pop_back();
  }
  entries_[index].hash = hash;
  uint64_t mixed = Mix(hash);
  slots_[Probe(hash, mixed)] = {static_cast<uint32_t>(mixed >> 32), index};
  ++num_entries_;
  return index;
}

void PrefixIndex::RemoveEntry(uint32_t index) {
  Entry& entry = entries_[index];
  size_t hole = Probe(entry.hash, Mix(entry.hash));
  // Entries behind move up, so that every one stays reachable from its home.
  for (size_t at = (hole + 1) & mask_; slots_[at].entry != kNone; at = (at + 1) & mask_) {
    size_t home = Mix(entries_[slots_[at].entry].hash) & mask_;
    if (((at - home) & mask_) >= ((at - hole) & mask_)) {
      slots_[hole] = slots_[at];
      hole = at;
    }
  }
  slots_[hole] = {};
  if (entry.capacity > 1) {
    many_bytes_ -= entry.capacity * sizeof(Holder);
    delete[] entry.many;
  }
  entry.capacity = 1;
  entry.count = 0;
  entry.signature = 0;
  free_entries_.push_back(index);
  --num_entries_;
}

void PrefixIndex::Grow() {
  std::vector<Slot> old = std::move(slots_);
  slots_.assign(2 * old.size(), {});
  mask_ = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.entry == kNone) continue;
    size_t at = Mix(entries_[slot.entry].hash) & mask_;
    while (slots_[at].entry != kNone) at = (at + 1) & mask_;
    slots_[at] = slot;
  }
}

size_t PrefixIndex::PlaceOf(const Entry& entry, ReplicaId replica) const {
  auto holders = entry.holders();
  auto found = std::lower_bound(holders.begin(), holders.end(), replica,
                                [](const Holder& holder, ReplicaId id) { return holder.replica < id; });
  return static_cast<size_t>(found - holders.begin());
}

PrefixIndex::Replica& PrefixIndex::At(ReplicaId replica) {
  if (replica >= replicas_.size()) replicas_.resize(replica + 1);
  return replicas_[replica];
}

void PrefixIndex::Append(uint32_t index) {
  Link& link = links_[index];
  Replica& replica = replicas_[link.replica];
  link.older = replica.newest;
  link.newer = kNone;
  (replica.newest == kNone ? replica.oldest : links_[replica.newest].newer) = index;
  replica.newest = index;
}

void PrefixIndex::Detach(uint32_t index) {
  Link& link = links_[index];
  Replica& replica = replicas_[link.replica];
  (link.older == kNone ? replica.oldest : links_[link.older].newer) = link.newer;
  (link.newer == kNone ? replica.newest : links_[link.newer].older) = link.older;
}

void PrefixIndex::AddLink(ReplicaId replica, const kv::BlockHash& hash) {
  uint32_t index = Lookup(hash);
  if (index == kNone) index = AddEntry(hash);
  Entry& entry = entries_[index];
  if (entry.count == entry.capacity) {
    auto* many = new Holder[2 * entry.capacity];
    std::ranges::copy(entry.holders(), many);
    if (entry.capacity > 1) delete[] entry.many;
    many_bytes_ += (entry.capacity > 1 ? entry.capacity : 2) * sizeof(Holder);
    entry.many = many;
    entry.capacity *= 2;
  }
  uint32_t link;
  if (free_links_.empty()) {
    link = static_cast<uint32_t>(links_.size());
    links_.emplace_back();
  } else {
    link = free_links_.back();
    free_links_.pop_back();
  }
  links_[link].entry = index;
  links_[link].replica = replica;
  size_t place = PlaceOf(entry, replica);
  ++entry.count;
  auto holders = entry.holders();
  std::copy_backward(holders.begin() + place, holders.end() - 1, holders.end());
  holders[place] = {replica, link};
  entry.signature += Signature(replica);
  ++num_links_;
  ++replicas_[replica].num_links;
  Append(link);
}

void PrefixIndex::RemoveLink(uint32_t index) {
  Detach(index);
  const Link& link = links_[index];
  Entry& entry = entries_[link.entry];
  auto holders = entry.holders();
  size_t place = PlaceOf(entry, link.replica);
  std::copy(holders.begin() + place + 1, holders.end(), holders.begin() + place);
  --entry.count;
  entry.signature -= Signature(link.replica);
  --num_links_;
  --replicas_[link.replica].num_links;
  free_links_.push_back(index);
  if (entry.count == 0) RemoveEntry(link.entry);
}

void PrefixIndex::MakeRoom(ReplicaId wanting) {
  if (num_links_ < max_links_) return;
  ReplicaId victim = wanting;
  for (ReplicaId id = 0; id < replicas_.size(); ++id) {
    if (replicas_[id].num_links > replicas_[victim].num_links) victim = id;
  }
  // Several at once, as the search for the largest is not free.
  for (int i = 0; i < 64 && replicas_[victim].oldest != kNone; ++i) RemoveLink(replicas_[victim].oldest);
}

void PrefixIndex::Use(ReplicaId replica, const kv::BlockHash& hash) {
  uint32_t index = Lookup(hash);
  if (index != kNone) {
    auto holders = entries_[index].holders();
    size_t place = PlaceOf(entries_[index], replica);
    if (place < holders.size() && holders[place].replica == replica) {
      Detach(holders[place].link);
      Append(holders[place].link);
      return;
    }
  }
  MakeRoom(replica);
  AddLink(replica, hash);
}

void PrefixIndex::SetCapacity(ReplicaId replica, size_t max_blocks) {
  Replica& at = At(replica);
  at.capacity = max_blocks;
  while (at.num_links > max_blocks) RemoveLink(at.oldest);
}

void PrefixIndex::Touch(ReplicaId replica, std::span<const kv::BlockHash> hashes) {
  Replica& at = At(replica);
  hashes = hashes.first(std::min(hashes.size(), std::min(at.capacity, max_links_)));
  // From the end, so that a prompt loses its last block first and what remains is a prefix.
  for (size_t i = hashes.size(); i-- > 0;) Use(replica, hashes[i]);
  while (at.num_links > at.capacity) RemoveLink(at.oldest);
}

void PrefixIndex::Store(ReplicaId replica, const kv::BlockHash& hash) {
  At(replica);
  Use(replica, hash);
}

void PrefixIndex::Erase(ReplicaId replica, const kv::BlockHash& hash) {
  uint32_t index = Lookup(hash);
  if (index == kNone) return;
  auto holders = entries_[index].holders();
  size_t place = PlaceOf(entries_[index], replica);
  if (place < holders.size() && holders[place].replica == replica) RemoveLink(holders[place].link);
}

void PrefixIndex::Clear(ReplicaId replica) {
  Replica& at = At(replica);
  while (at.oldest != kNone) RemoveLink(at.oldest);
}

void PrefixIndex::Find(std::span<const kv::BlockHash> hashes, std::vector<Match>* matches) {
  matches->clear();
  if (hashes.empty()) return;
  uint32_t first = Lookup(hashes[0]);
  if (first == kNone) return;
  candidates_.clear();
  for (const Holder& holder : entries_[first].holders()) candidates_.push_back(holder.replica);
  uint64_t signature = entries_[first].signature;
  uint32_t depth = 1;
  for (; depth < hashes.size() && !candidates_.empty(); ++depth) {
    uint32_t index = Lookup(hashes[depth]);
    if (index == kNone) break;
    const Entry& entry = entries_[index];
    // Mostly the very replicas that hold the block before.
    if (entry.signature == signature && entry.count == candidates_.size()) continue;
    ++mark_;
    for (const Holder& holder : entry.holders()) replicas_[holder.replica].mark = mark_;
    size_t kept = 0;
    signature = 0;
    for (ReplicaId id : candidates_) {
      if (replicas_[id].mark == mark_) {
        candidates_[kept++] = id;
        signature += Signature(id);
      } else {
        matches->push_back({id, depth});
      }
    }
    candidates_.resize(kept);
  }
  for (ReplicaId id : candidates_) matches->push_back({id, depth});
}

size_t PrefixIndex::MemoryBytes() const {
  return slots_.capacity() * sizeof(Slot) + entries_.capacity() * sizeof(Entry) +
         links_.capacity() * sizeof(Link) + many_bytes_ + replicas_.capacity() * sizeof(Replica) +
         (free_entries_.capacity() + free_links_.capacity()) * sizeof(uint32_t);
}

bool PrefixIndex::Check() const {
  size_t num_links = 0;
  size_t num_entries = 0;
  for (const Slot& slot : slots_) {
    if (slot.entry == kNone) continue;
    const Entry& entry = entries_[slot.entry];
    ++num_entries;
    if (entry.count == 0 || Lookup(entry.hash) != slot.entry) return false;
    uint64_t signature = 0;
    ReplicaId last = 0;
    for (const Holder& holder : entry.holders()) {
      if (&holder != entry.holders().data() && holder.replica <= last) return false;
      last = holder.replica;
      signature += Signature(holder.replica);
      if (links_[holder.link].entry != slot.entry || links_[holder.link].replica != holder.replica)
        return false;
    }
    if (signature != entry.signature) return false;
    num_links += entry.count;
  }
  size_t listed = 0;
  for (const Replica& replica : replicas_) {
    size_t count = 0;
    for (uint32_t at = replica.oldest; at != kNone; at = links_[at].newer) ++count;
    if (count != replica.num_links) return false;
    listed += count;
  }
  return num_entries == num_entries_ && num_links == num_links_ && listed == num_links_;
}

}  // namespace twinjet::epp
