// The scheduler's ledger as Python holds it.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "kv_convert.h"
#include "sched/kv_ledger.h"

namespace twinjet::bindings {

// The ledger and room for the hashes of a call, which come as bytes of any alignment.
struct Ledger {
  sched::KvLedger native;
  int block_shift;
  kv::BlockHash root;  // of prompts without a salt
  std::vector<kv::BlockHash> hashes;

  explicit Ledger(const sched::LedgerOptions& options)
      : native(options),
        block_shift(std::countr_zero(static_cast<uint32_t>(options.blocks.block_size))),
        root(native.hasher().Root({})) {}

  bool Read(PyObject* object, int64_t least) {
    HashSource source;
    if (!source.Read(object) || !source.Check(0, source.size())) return false;
    if (source.size() < least) {
      PyErr_Format(PyExc_ValueError, "%zd hashes for %lld full blocks",
                   static_cast<Py_ssize_t>(source.size()), static_cast<long long>(least));
      return false;
    }
    hashes.resize(static_cast<size_t>(source.size()));
    for (int64_t i = 0; i < source.size(); ++i) hashes[static_cast<size_t>(i)] = source.at(i);
    return true;
  }
};

}  // namespace twinjet::bindings
