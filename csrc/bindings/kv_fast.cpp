// The calls an engine makes per request and step, as fast methods.
#include <pybind11/numpy.h>

#include <algorithm>

#include "fast_call.h"
#include "kv_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {

kv::BlockManager* ManagerOf(PyObject* self) { return SelfOf<kv::BlockManager>(self); }

namespace {

using kv::Status;
using Args = FastArgs;

// None where there was no room, else the exception.
PyObject* Refuse(Status status, kv::SequenceId id) {
  if (status == Status::kNoRoom) Py_RETURN_NONE;
  return RaiseStatus(status, id);
}

PyObject* Open(kv::BlockManager& manager, Args, Py_ssize_t) {
  kv::SequenceId id = 0;
  Status status = manager.Open(&id);
  return status == Status::kOk ? PyLong_FromLongLong(id) : RaiseStatus(status);
}

PyObject* Free(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  if (!ReadSequenceId(args[0], &id)) return nullptr;
  Status status = manager.Free(id);
  if (status != Status::kOk) return RaiseStatus(status, id);
  Py_RETURN_NONE;
}

PyObject* Append(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  TokenIds tokens;
  if (!ReadSequenceId(args[0], &id) || !tokens.Read(args[1])) return nullptr;
  std::vector<kv::BlockId> new_blocks;
  Status status = manager.Append(id, tokens.span(), &new_blocks);
  return status == Status::kOk ? BlockTuple(new_blocks) : Refuse(status, id);
}

PyObject* AppendOne(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  int32_t token = 0;
  if (!ReadSequenceId(args[0], &id) || !ReadToken(args[1], &token)) return nullptr;
  kv::BlockId new_block = kv::kNoBlock;
  Status status = manager.AppendOne(id, token, &new_block);
  return status == Status::kOk ? PyLong_FromLong(new_block) : Refuse(status, id);
}

PyObject* AppendCount(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  int64_t num_tokens = 0;
  if (!ReadSequenceId(args[0], &id) || !ReadInt(args[1], "num_tokens", &num_tokens)) return nullptr;
  std::vector<kv::BlockId> new_blocks;
  Status status = manager.AppendCount(id, num_tokens, &new_blocks);
  return status == Status::kOk ? BlockTuple(new_blocks) : Refuse(status, id);
}

PyObject* AppendBatch(kv::BlockManager& manager, Args args, Py_ssize_t count) {
  std::vector<kv::SequenceId> ids;
  TokenIds tokens;
  bool knows_tokens = count > 1 && args[1] != Py_None;
  if (!ReadSequenceIds(args[0], &ids) || (knows_tokens && !tokens.Read(args[1]))) return nullptr;
  if (knows_tokens && tokens.span().size() != ids.size()) {
    return PyErr_Format(PyExc_ValueError, "%zu tokens for %zu sequences", tokens.span().size(), ids.size());
  }
  py::array_t<kv::BlockId> new_blocks(static_cast<py::ssize_t>(ids.size()));
  Status status =
      manager.AppendBatch(ids, knows_tokens ? tokens.span().data() : nullptr, new_blocks.mutable_data());
  if (status == Status::kOk) return new_blocks.release().ptr();
  auto unknown = std::ranges::find_if(ids, [&](kv::SequenceId id) { return !manager.FindSequence(id); });
  return Refuse(status, unknown == ids.end() ? -1 : *unknown);
}

PyObject* MatchHashes(kv::BlockManager& manager, Args args, Py_ssize_t count) {
  HashSource source;
  int64_t max_blocks = -1;
  if ((count > 1 && !ReadInt(args[1], "max_blocks", &max_blocks)) || !source.Read(args[0])) return nullptr;
  if (max_blocks < -1) return RaiseStatus(Status::kBadCount);
  int64_t limit = max_blocks < 0 ? source.size() : std::min(max_blocks, source.size());
  // In pieces, so that a miss at the start of a long prompt is cheap.
  constexpr int64_t kPiece = 64;
  kv::BlockHash hashes[kPiece];
  std::vector<kv::BlockId> blocks;
  for (int64_t first = 0; first < limit; first += kPiece) {
    int64_t size = std::min(kPiece, limit - first);
    if (!source.Check(first, first + size)) return nullptr;
    for (int64_t i = 0; i < size; ++i) hashes[i] = source.at(first + i);
    blocks.resize(static_cast<size_t>(first + size));
    int32_t found = manager.Match({hashes, static_cast<size_t>(size)}, blocks.data() + first);
    if (found < size) {
      blocks.resize(static_cast<size_t>(first + found));
      break;
    }
  }
  return BlockList(blocks);
}

PyObject* Publish(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  int64_t num_tokens = 0;
  int64_t num_new = 0;
  if (!ReadSequenceId(args[0], &id) || !ReadInt(args[1], "num_tokens", &num_tokens)) return nullptr;
  Status status = manager.Publish(id, num_tokens, &num_new);
  return status == Status::kOk ? PyLong_FromLongLong(num_new) : RaiseStatus(status, id);
}

// Checks all that PublishHashes would refuse or could not read. For a sequence about to hold
// num_blocks blocks of which num_published are published already.
bool CheckPublish(kv::BlockManager& manager, const kv::Sequence& sequence, int64_t num_tokens,
                  const HashSource& hashes, int64_t num_blocks, int64_t num_published) {
  Status status = Status::kOk;
  int64_t num_full = num_tokens / manager.block_size();
  if (num_tokens < 0 || num_full > num_blocks) {
    status = Status::kBadCount;
  } else if (!sequence.is_external) {
    status = Status::kWrongKind;
  } else if (manager.prefix_cache_enabled() && num_full > num_published) {
    if (num_full > hashes.size()) status = Status::kTooFewHashes;
    // The hash before the first new one is its parent in the event log.
    if (status == Status::kOk) return hashes.Check(std::max<int64_t>(num_published - 1, 0), num_full);
  }
  if (status != Status::kOk) RaiseStatus(status);
  return status == Status::kOk;
}

// The token ids of blocks that are about to be published, for the event log. Empty where the log is off or
// the caller tells none.
class NewTokens {
 public:
  // tokens: a list of the sequence's token ids, or None. Blocks first..end-1 are to be published. False with
  // an exception set if they are not to be had.
  bool Read(const kv::BlockManager& manager, PyObject* tokens, int64_t first, int64_t end) {
    first_ = first;
    block_size_ = manager.block_size();
    if (tokens == Py_None || !manager.events_enabled() || end <= first) return true;
    if (!PyList_Check(tokens)) {
      PyErr_SetString(PyExc_TypeError, "tokens must be a list or None");
      return false;
    }
    if (PyList_GET_SIZE(tokens) < end * block_size_) {
      PyErr_SetString(PyExc_ValueError, "fewer tokens than the blocks to publish hold");
      return false;
    }
    tokens_.reserve(static_cast<size_t>((end - first) * block_size_));
    for (int64_t i = first * block_size_; i < end * block_size_; ++i) {
      int32_t token = 0;
      if (!ReadToken(PyList_GET_ITEM(tokens, i), &token)) return false;
      tokens_.push_back(token);
    }
    return true;
  }
  std::span<const int32_t> operator()(int64_t block) const {
    if (tokens_.empty()) return {};
    auto size = static_cast<size_t>(block_size_);
    return std::span(tokens_).subspan(static_cast<size_t>(block - first_) * size, size);
  }

 private:
  int64_t first_ = 0;
  int64_t block_size_ = 0;
  std::vector<int32_t> tokens_;
};

PyObject* PublishHashes(kv::BlockManager& manager, Args args, Py_ssize_t count) {
  kv::SequenceId id = 0;
  int64_t num_tokens = 0;
  int64_t num_new = 0;
  HashSource hashes;
  if (!ReadSequenceId(args[0], &id) || !ReadInt(args[1], "num_tokens", &num_tokens) ||
      !hashes.Read(args[2])) {
    return nullptr;
  }
  kv::Sequence* sequence = manager.FindSequence(id);
  if (!sequence) return RaiseUnknownSequence(id);
  if (!CheckPublish(manager, *sequence, num_tokens, hashes, sequence->num_blocks, sequence->num_published)) {
    return nullptr;
  }
  NewTokens tokens;
  int64_t num_full = num_tokens / manager.block_size();
  if (count > 3 && !tokens.Read(manager, args[3], sequence->num_published, num_full)) return nullptr;
  manager.PublishHashes(
      *sequence, num_tokens, hashes.size(), [&](int64_t i) { return hashes.at(i); }, tokens, &num_new);
  return PyLong_FromLongLong(num_new);
}

PyObject* Reserve(kv::BlockManager& manager, Args args, Py_ssize_t count) {
  kv::SequenceId id = 0;
  int64_t num_tokens = 0;
  int64_t num_publish_tokens = 0;
  kv::Headroom headroom;
  std::vector<kv::BlockId> matched;
  HashSource hashes;
  if (!ReadSequenceId(args[0], &id) || !ReadInt(args[1], "num_tokens", &num_tokens)) return nullptr;
  if (count > 2 && !ReadInt(args[2], "num_publish_tokens", &num_publish_tokens)) return nullptr;
  if (count > 4 && !ReadBlockIds(args[4], &matched)) return nullptr;
  if (count > 5 && !ReadInt(args[5], "reserved_blocks", &headroom.reserved_blocks)) return nullptr;
  if (count > 6) {
    int truth = PyObject_IsTrue(args[6]);
    if (truth < 0) return nullptr;
    headroom.use_watermark = truth != 0;
  }
  if (count > 3 && !hashes.Read(args[3])) return nullptr;

  kv::Sequence* sequence = manager.FindSequence(id);
  if (!sequence) return RaiseUnknownSequence(id);
  NewTokens tokens;
  if (num_publish_tokens != 0) {
    int64_t num_held = sequence->num_blocks + static_cast<int64_t>(matched.size());
    int64_t num_published = matched.empty() ? sequence->num_published : static_cast<int64_t>(matched.size());
    int64_t num_blocks = std::max(num_held, num_tokens < 0 ? 0 : manager.BlocksFor(num_tokens));
    if (!CheckPublish(manager, *sequence, num_publish_tokens, hashes, num_blocks, num_published))
      return nullptr;
    if (count > 7 &&
        !tokens.Read(manager, args[7], num_published, num_publish_tokens / manager.block_size())) {
      return nullptr;
    }
  }
  int64_t num_new = 0;
  Status status = manager.Reserve(*sequence, num_tokens, matched, headroom, &num_new);
  if (status != Status::kOk) return Refuse(status, id);
  if (num_publish_tokens > 0) {
    int64_t num_published = 0;
    manager.PublishHashes(
        *sequence, num_publish_tokens, hashes.size(), [&](int64_t i) { return hashes.at(i); }, tokens,
        &num_published);
  }
  return BlockTuple(sequence->blocks().last(static_cast<size_t>(num_new)));
}

PyObject* NumTokens(kv::BlockManager& manager, Args args, Py_ssize_t) {
  kv::SequenceId id = 0;
  if (!ReadSequenceId(args[0], &id)) return nullptr;
  const kv::Sequence* sequence = manager.FindSequence(id);
  return sequence ? PyLong_FromLongLong(sequence->num_tokens) : RaiseUnknownSequence(id);
}

PyObject* BlocksNeeded(kv::BlockManager& manager, Args args, Py_ssize_t count) {
  int64_t num_tokens = 0;
  int64_t num_matched = 0;
  if (!ReadInt(args[0], "num_tokens", &num_tokens)) return nullptr;
  if (count > 1 && !ReadInt(args[1], "num_matched_blocks", &num_matched)) return nullptr;
  if (num_tokens < 0 || num_tokens > INT64_MAX / 2 || num_matched < 0) return RaiseStatus(Status::kBadCount);
  return PyLong_FromLongLong(std::max<int64_t>(manager.BlocksFor(num_tokens) - num_matched, 0));
}

TWINJET_FAST(kv::BlockManager, "open", Open, 0, 0);
TWINJET_FAST(kv::BlockManager, "free", Free, 1, 1);
TWINJET_FAST(kv::BlockManager, "append", Append, 2, 2);
TWINJET_FAST(kv::BlockManager, "append_one", AppendOne, 2, 2);
TWINJET_FAST(kv::BlockManager, "append_count", AppendCount, 2, 2);
TWINJET_FAST(kv::BlockManager, "append_batch", AppendBatch, 1, 2);
TWINJET_FAST(kv::BlockManager, "match_hashes", MatchHashes, 1, 2);
TWINJET_FAST(kv::BlockManager, "publish", Publish, 2, 2);
TWINJET_FAST(kv::BlockManager, "publish_hashes", PublishHashes, 3, 4);
TWINJET_FAST(kv::BlockManager, "reserve", Reserve, 2, 8);
TWINJET_FAST(kv::BlockManager, "num_tokens", NumTokens, 1, 1);
TWINJET_FAST(kv::BlockManager, "blocks_needed", BlocksNeeded, 1, 2);

}  // namespace

void AddKvFastMethods(py::handle manager_type) {
  AddFastMethods(manager_type, {&OpenDef, &FreeDef, &AppendDef, &AppendOneDef, &AppendCountDef,
                                &AppendBatchDef, &MatchHashesDef, &PublishDef, &PublishHashesDef, &ReserveDef,
                                &NumTokensDef, &BlocksNeededDef});
}

}  // namespace twinjet::bindings
