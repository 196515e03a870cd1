// Between Python objects and csrc/kv: token ids, block hashes, sequence ids, errors. Functions that
// can fail set a Python error and return false (or null); none throws.
#pragma once

#include <Python.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kv/block_manager.h"

namespace twinjet::bindings {

// Token ids read from a Python object: borrowed from an int32 buffer, else converted.
class TokenIds {
 public:
  TokenIds() = default;
  ~TokenIds() {
    if (buffer_.obj) PyBuffer_Release(&buffer_);
  }
  TokenIds(const TokenIds&) = delete;
  TokenIds& operator=(const TokenIds&) = delete;

  // May run Python code (__index__), so call it before looking into the manager.
  bool Read(PyObject* object);
  std::span<const int32_t> span() const { return tokens_; }

 private:
  bool ReadBuffer(PyObject* object);
  bool ReadItems(PyObject* object);

  Py_buffer buffer_{};
  std::vector<int32_t> converted_;
  std::span<const int32_t> tokens_;
};

// Block hashes as given by the caller: 16 bytes each in one bytes object, or a list or tuple of
// bytes objects. Borrowed, and valid as long as no Python code runs.
class HashSource {
 public:
  // null and None mean no hashes. Looks at no element yet.
  bool Read(PyObject* object);
  int64_t size() const { return size_; }
  // Checks the elements first..last-1, so that at() is sound for them.
  bool Check(int64_t first, int64_t last) const;
  kv::BlockHash at(int64_t i) const {
    return kv::BlockHash::FromBytes(items_ ? PyBytes_AS_STRING(items_[i])
                                           : bytes_ + i * kv::BlockHash::kBytes);
  }

 private:
  PyObject* const* items_ = nullptr;
  const char* bytes_ = nullptr;
  int64_t size_ = 0;
};

// An int of at most 64 bits; `what` names it in the TypeError or ValueError.
bool ReadInt(PyObject* object, const char* what, int64_t* value);
// As ReadInt, but what fits no sequence id is a KeyError.
bool ReadSequenceId(PyObject* object, kv::SequenceId* id);
// One token id, 0..2^31-1.
bool ReadToken(PyObject* object, int32_t* token);
// A list, tuple or int32/int64 array of sequence ids.
bool ReadSequenceIds(PyObject* object, std::vector<kv::SequenceId>* ids);
// A list, tuple or int32/int64 array of block ids; null and None mean none.
bool ReadBlockIds(PyObject* object, std::vector<kv::BlockId>* blocks);

PyObject* BlockTuple(std::span<const kv::BlockId> blocks);
PyObject* BlockList(std::span<const kv::BlockId> blocks);

// Sets the exception that `status` stands for; kOk and kNoRoom stand for none. Returns null.
PyObject* RaiseStatus(kv::Status status, kv::SequenceId id = -1);
PyObject* RaiseUnknownSequence(kv::SequenceId id);

// The manager inside a Python BlockManager; null and TypeError where __init__ has not run.
kv::BlockManager* ManagerOf(PyObject* self);

}  // namespace twinjet::bindings
