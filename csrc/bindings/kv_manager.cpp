// twinjet._core.BlockManager, but for the hot calls in kv_fast.cpp, and its plain result types.
#include <pybind11/stl.h>

#include <string>

#include "kv_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using kv::Status;

struct PrefixMatch {
  int64_t num_tokens;
  std::vector<kv::BlockId> block_ids;
  std::vector<kv::BlockHash> hashes;
};

struct KvEvent {
  kv::Event event;
  std::vector<int32_t> tokens;
};

struct KvStats : kv::Stats {
  uint64_t num_dropped_events;
};

// Throws what `status` stands for; true if there was room.
bool Succeeded(Status status, kv::SequenceId id = -1) {
  if (status == Status::kOk) return true;
  if (status == Status::kNoRoom) return false;
  RaiseStatus(status, id);
  throw py::error_already_set();
}

std::vector<kv::BlockId> BlockIdsOf(const py::object& object) {
  std::vector<kv::BlockId> blocks;
  if (!ReadBlockIds(object.ptr(), &blocks)) throw py::error_already_set();
  return blocks;
}

const kv::Sequence& SequenceOf(const kv::BlockManager& manager, kv::SequenceId id) {
  const kv::Sequence* sequence = manager.FindSequence(id);
  if (!sequence) {
    RaiseUnknownSequence(id);
    throw py::error_already_set();
  }
  return *sequence;
}

std::unique_ptr<kv::BlockManager> MakeManager(int64_t num_blocks, int64_t block_size, bool prefix_cache,
                                              bool null_block, double watermark, const std::string& algorithm,
                                              const py::object& hash_key, int64_t max_events) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  kv::ManagerOptions options;
  if (num_blocks < (null_block ? 2 : 1) || num_blocks > kMaxBlocks) {
    throw py::value_error("num_blocks must be in 1..2**30, at least 2 with null_block, not " +
                          std::to_string(num_blocks));
  }
  if (!(watermark >= 0.0 && watermark < 1.0)) {
    throw py::value_error("watermark must be at least 0 and below 1, not " + std::to_string(watermark));
  }
  if (max_events < 0 || max_events > kMaxBlocks) {
    throw py::value_error("max_events must be in 0..2**30, not " + std::to_string(max_events));
  }
  options.num_blocks = static_cast<int32_t>(num_blocks);
  options.block_size = CheckedBlockSize(block_size);
  options.prefix_cache = prefix_cache;
  options.null_block = null_block;
  options.watermark_blocks = static_cast<int32_t>(watermark * static_cast<double>(num_blocks));
  options.algorithm = AlgorithmByName(algorithm);
  options.hash_key = KeyOf(hash_key);
  options.max_events = static_cast<int32_t>(max_events);
  return std::make_unique<kv::BlockManager>(options);
}

PrefixMatch Match(const kv::BlockManager& manager, const py::object& tokens, const py::bytes& salt,
                  std::optional<int64_t> max_tokens) {
  TokenIds ids;
  if (!ids.Read(tokens.ptr())) throw py::error_already_set();
  auto num_tokens = static_cast<int64_t>(ids.span().size());
  if (max_tokens && *max_tokens < 0) throw py::value_error("max_tokens must not be negative");
  PrefixMatch match{};
  if (!manager.prefix_cache_enabled()) return match;
  match.hashes = HashFullBlocks(manager.hasher(), manager.hasher().Root(BytesOf(salt)), ids.span());
  int64_t limit = std::min(max_tokens.value_or(num_tokens - 1), num_tokens);
  auto max_blocks = static_cast<size_t>(std::max<int64_t>(limit, 0) / manager.block_size());
  match.block_ids.resize(max_blocks);
  int32_t found = manager.Match(std::span(match.hashes).first(max_blocks), match.block_ids.data());
  match.block_ids.resize(static_cast<size_t>(found));
  match.num_tokens = static_cast<int64_t>(found) * manager.block_size();
  return match;
}

std::optional<kv::SequenceId> Allocate(kv::BlockManager& manager, const py::object& tokens,
                                       const py::bytes& salt, const std::optional<py::bytes>& given,
                                       int64_t num_lookahead_tokens, int64_t reserved_blocks,
                                       bool use_watermark, bool publish) {
  TokenIds ids;
  if (!ids.Read(tokens.ptr())) throw py::error_already_set();
  kv::BlockHash root = manager.hasher().Root(BytesOf(salt));
  std::vector<kv::BlockHash> hashes;
  if (given) {
    HashSource source;
    if (!source.Read(given->ptr())) throw py::error_already_set();
    for (int64_t i = 0; i < source.size(); ++i) hashes.push_back(source.at(i));
  } else if (manager.prefix_cache_enabled()) {
    hashes = HashFullBlocks(manager.hasher(), root, ids.span());
  }
  kv::AllocateOptions options{
      .num_lookahead_tokens = num_lookahead_tokens,
      .headroom = {.reserved_blocks = reserved_blocks, .use_watermark = use_watermark},
      .publish = publish};
  kv::SequenceId id = 0;
  if (!Succeeded(manager.Allocate(ids.span(), hashes, root, options, &id))) return std::nullopt;
  return id;
}

std::optional<std::pair<kv::SequenceId, std::vector<std::pair<kv::BlockId, kv::BlockId>>>> Fork(
    kv::BlockManager& manager, kv::SequenceId id) {
  kv::SequenceId child = 0;
  kv::BlockCopy copy;
  if (!Succeeded(manager.Fork(id, &child, &copy), id)) return std::nullopt;
  std::vector<std::pair<kv::BlockId, kv::BlockId>> copies;
  if (copy.source != kv::kNoBlock) copies.emplace_back(copy.source, copy.destination);
  return std::pair(child, std::move(copies));
}

std::vector<KvEvent> TakeEvents(kv::BlockManager& manager) {
  kv::EventLog& log = manager.events();
  std::vector<KvEvent> events;
  events.reserve(log.size());
  for (size_t i = 0; i < log.size(); ++i) {
    std::span<const int32_t> tokens = log.tokens(i);
    events.push_back({log.at(i), {tokens.begin(), tokens.end()}});
  }
  log.Drain();
  return events;
}

py::bytes DrainEvents(kv::BlockManager& manager, int64_t max_events) {
  if (max_events < 1) throw py::value_error("max_events must be positive");
  std::string bytes;
  manager.events().Encode(static_cast<size_t>(max_events), &bytes);
  return bytes;
}

void SetTag(kv::BlockManager& manager, kv::SequenceId id, uint32_t tag) {
  kv::Sequence* sequence = manager.FindSequence(id);
  if (!sequence) {
    RaiseUnknownSequence(id);
    throw py::error_already_set();
  }
  sequence->tag = tag;
}

void BindResults(py::module_& module) {
  py::class_<PrefixMatch>(module, "PrefixMatch", "What the prefix cache holds of a prompt.")
      .def_readonly("num_tokens", &PrefixMatch::num_tokens)
      .def_readonly("block_ids", &PrefixMatch::block_ids)
      .def_property_readonly("hashes", [](const PrefixMatch& match) { return ToBytes(match.hashes); });

  py::class_<KvEvent>(module, "KvEvent", "One change of the prefix cache.")
      .def_property_readonly("kind",
                             [](const KvEvent& self) {
                               switch (self.event.kind) {
                                 case kv::Event::Kind::kStored:
                                   return "stored";
                                 case kv::Event::Kind::kRemoved:
                                   return "removed";
                                 default:
                                   return "cleared";
                               }
                             })
      .def_property_readonly("sequence_number",
                             [](const KvEvent& self) { return self.event.sequence_number; })
      .def_property_readonly("block_hash",
                             [](const KvEvent& self) {
                               bool has_hash = self.event.kind != kv::Event::Kind::kCleared;
                               return ToBytes({&self.event.hash, has_hash ? 1u : 0u});
                             })
      .def_property_readonly(
          "parent_hash",
          [](const KvEvent& self) { return ToBytes({&self.event.parent, self.event.has_parent ? 1u : 0u}); })
      .def_property_readonly("block_id", [](const KvEvent& self) { return self.event.block; })
      .def_readonly("tokens", &KvEvent::tokens);

  py::class_<KvStats>(module, "KvStats", "Counters of a BlockManager.")
      .def_readonly("num_queries", &KvStats::num_queries)
      .def_readonly("num_queried_tokens", &KvStats::num_queried_tokens)
      .def_readonly("num_hit_tokens", &KvStats::num_hit_tokens)
      .def_readonly("num_hits", &KvStats::num_hits)
      .def_readonly("num_allocated_blocks", &KvStats::num_allocated_blocks)
      .def_readonly("num_evicted_blocks", &KvStats::num_evicted_blocks)
      .def_readonly("num_failed", &KvStats::num_failed)
      .def_readonly("num_dropped_events", &KvStats::num_dropped_events);
}

int32_t CheckedBlock(const kv::BlockManager& manager, int64_t block) {
  if (block < 0 || block >= manager.num_blocks()) {
    throw py::value_error("block id " + std::to_string(block) + " is out of range");
  }
  return static_cast<int32_t>(block);
}

}  // namespace

void BindBlockManager(py::module_& module) {
  BindResults(module);
  py::class_<kv::BlockManager> manager(
      module, "BlockManager",
      "Paged KV-cache accounting: which sequence holds which block, and what the "
      "cache remembers.");
  manager
      .def(py::init(&MakeManager), py::arg("num_blocks"), py::arg("block_size"), py::kw_only(),
           py::arg("prefix_cache") = true, py::arg("null_block") = false, py::arg("watermark") = 0.0,
           py::arg("algorithm") = "sha256", py::arg("hash_key") = py::none(), py::arg("max_events") = 0)
      .def_property_readonly("num_blocks", &kv::BlockManager::num_blocks)
      .def_property_readonly("block_size", &kv::BlockManager::block_size)
      .def_property_readonly("prefix_cache", &kv::BlockManager::prefix_cache_enabled)
      .def_property_readonly("null_block_id",
                             [](const kv::BlockManager& self) {
                               return self.has_null_block() ? std::optional<int>(0) : std::nullopt;
                             })
      .def_property_readonly("watermark_blocks", &kv::BlockManager::watermark_blocks)
      .def_property_readonly("hasher", &kv::BlockManager::hasher, py::return_value_policy::reference_internal)
      .def_property_readonly("num_free_blocks", &kv::BlockManager::num_free_blocks)
      .def_property_readonly("num_used_blocks", &kv::BlockManager::num_used_blocks)
      .def_property_readonly("num_cached_blocks", &kv::BlockManager::num_cached_blocks)
      .def_property_readonly("usage",
                             [](const kv::BlockManager& self) {
                               return static_cast<double>(self.num_used_blocks()) /
                                      self.pool().num_circulating();
                             })
      .def_property_readonly("num_sequences", &kv::BlockManager::num_sequences)
      .def_property_readonly("memory_bytes", &kv::BlockManager::MemoryBytes)
      .def("match", Match, py::arg("tokens"), py::kw_only(), py::arg("salt") = py::bytes(),
           py::arg("max_tokens") = py::none())
      .def("allocate", Allocate, py::arg("tokens"), py::kw_only(), py::arg("salt") = py::bytes(),
           py::arg("hashes") = py::none(), py::arg("num_lookahead_tokens") = 0,
           py::arg("reserved_blocks") = 0, py::arg("use_watermark") = false, py::arg("publish") = true)
      .def("fork", Fork, py::arg("sequence"), py::pos_only())
      .def(
          "detach",
          [](kv::BlockManager& self, kv::SequenceId id) {
            std::vector<kv::BlockId> blocks;
            Succeeded(self.Detach(id, &blocks), id);
            return blocks;
          },
          py::arg("sequence"), py::pos_only())
      .def(
          "free_blocks",
          [](kv::BlockManager& self, const py::object& blocks) {
            Succeeded(self.FreeBlocks(BlockIdsOf(blocks)));
          },
          py::arg("block_ids"), py::pos_only())
      .def(
          "evict",
          [](kv::BlockManager& self, const py::object& blocks) {
            int64_t num_evicted = 0;
            Succeeded(self.Evict(BlockIdsOf(blocks), &num_evicted));
            return num_evicted;
          },
          py::arg("block_ids"), py::pos_only())
      .def("reset", &kv::BlockManager::Reset)
      .def(
          "block_table", [](const py::object& self, kv::SequenceId id) { return MakeBlockTable(self, id); },
          py::arg("sequence"), py::pos_only())
      .def(
          "block_ids",
          [](const kv::BlockManager& self, kv::SequenceId id) {
            std::span<const kv::BlockId> blocks = SequenceOf(self, id).blocks();
            return std::vector<kv::BlockId>(blocks.begin(), blocks.end());
          },
          py::arg("sequence"), py::pos_only())
      .def(
          "num_cached_tokens",
          [](const kv::BlockManager& self, kv::SequenceId id) {
            return SequenceOf(self, id).num_cached_tokens;
          },
          py::arg("sequence"), py::pos_only())
      .def(
          "num_published_blocks",
          [](const kv::BlockManager& self, kv::SequenceId id) { return SequenceOf(self, id).num_published; },
          py::arg("sequence"), py::pos_only())
      .def(
          "count_free",
          [](const kv::BlockManager& self, const py::object& object) {
            std::vector<kv::BlockId> blocks = BlockIdsOf(object);
            for (kv::BlockId block : blocks) CheckedBlock(self, block);
            return self.CountFree(blocks);
          },
          py::arg("block_ids"), py::pos_only())
      .def(
          "reference_count",
          [](const kv::BlockManager& self, int64_t block) {
            return self.pool().ref_count(CheckedBlock(self, block));
          },
          py::arg("block_id"), py::pos_only())
      .def(
          "block_hash",
          [](const kv::BlockManager& self, int64_t block) -> std::optional<py::bytes> {
            int32_t checked = CheckedBlock(self, block);
            if (!self.IsCached(checked)) return std::nullopt;
            return ToBytes({&self.cache().HashOf(checked), 1});
          },
          py::arg("block_id"), py::pos_only())
      .def("free_order",
           [](const kv::BlockManager& self) {
             std::vector<kv::BlockId> order;
             order.reserve(static_cast<size_t>(self.num_free_blocks()));
             const kv::BlockPool& pool = self.pool();
             for (kv::BlockId b = pool.NextFree(kv::kNoBlock); b != kv::kNoBlock; b = pool.NextFree(b)) {
               order.push_back(b);
             }
             return order;
           })
      .def("check",
           [](const kv::BlockManager& self) {
             std::string wrong = self.Check();
             if (!wrong.empty()) throw std::runtime_error(wrong);
           })
      .def("stats", [](kv::BlockManager& self) { return KvStats{self.stats(), self.events().num_dropped()}; })
      .def("reset_stats", &kv::BlockManager::ResetStats)
      .def("take_events", TakeEvents)
      .def("drain_events", DrainEvents, py::arg("max_events"))
      .def("set_tag", SetTag, py::arg("sequence"), py::arg("tag"));
  AddKvFastMethods(manager);
}

}  // namespace twinjet::bindings
