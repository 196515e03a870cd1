// Python face of csrc/sched: the calls that the service scheduler makes per request and per token.
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "bindings.h"
#include "fast_call.h"
#include "kv_internal.h"
#include "sched/length_estimator.h"
#include "sched/rank_counts.h"
#include "sched_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using sched::KvLedger;
using sched::LengthEstimator;
using sched::RankCounts;
using Args = FastArgs;

constexpr int64_t kMaxTokens = int64_t{1} << 40;

bool ReadCount(PyObject* object, const char* what, int64_t least, int64_t most, int64_t* value) {
  if (!ReadInt(object, what, value)) return false;
  if (*value >= least && *value <= most) return true;
  PyErr_Format(PyExc_ValueError, "%s must be in %lld..%lld, not %lld", what, static_cast<long long>(least),
               static_cast<long long>(most), static_cast<long long>(*value));
  return false;
}

PyObject* RaiseUnknownHolding(PyObject* id) {
  PyErr_Format(PyExc_KeyError, "unknown or released holding %R", id);
  return nullptr;
}

double CheckedPositive(const char* what, double value) {
  if (std::isfinite(value) && value > 0) return value;
  throw py::value_error(std::string(what) + " must be positive, not " + std::to_string(value));
}

double CheckedLength(const char* what, double value) {
  if (value >= 0) return value;
  throw py::value_error(std::string(what) + " must not be negative, not " + std::to_string(value));
}

std::unique_ptr<Ledger> MakeLedger(int64_t num_blocks, int64_t block_size, bool prefix_cache, double headroom,
                                   int64_t lookahead_tokens, std::optional<double> sigmas, int64_t longest) {
  if (num_blocks < 1 || num_blocks > int64_t{1} << 30) {
    throw py::value_error("num_blocks must be in 1..2**30, not " + std::to_string(num_blocks));
  }
  if (!(headroom >= 0 && headroom < 1)) throw py::value_error("headroom must be in [0, 1)");
  if (sigmas && !(std::isfinite(*sigmas) && *sigmas >= 0)) {
    throw py::value_error("sigmas must be finite and not negative");
  }
  if (lookahead_tokens < 0 || lookahead_tokens > kMaxTokens || longest < 0 || longest > kMaxTokens) {
    throw py::value_error("lookahead_tokens and longest must be in 0..2**40");
  }
  sched::LedgerOptions options;
  options.blocks.num_blocks = static_cast<int32_t>(num_blocks);
  options.blocks.block_size = CheckedBlockSize(block_size);
  options.blocks.prefix_cache = prefix_cache;
  // The hashes stay in this process and name no content, so the faster function will do.
  options.blocks.algorithm = kv::BlockHasher::Algorithm::kSipHash;
  options.blocks.hash_key = KeyOf(py::none());
  options.num_usable_blocks =
      static_cast<int32_t>(num_blocks) - static_cast<int32_t>(static_cast<double>(num_blocks) * headroom);
  options.num_lookahead_tokens = lookahead_tokens;
  options.sigmas = sigmas;
  options.num_longest = longest;
  return std::make_unique<Ledger>(options);
}

PyObject* HashTokens(Ledger& self, Args args, Py_ssize_t) {
  TokenIds ids;
  if (!ids.Read(args[0])) return nullptr;
  if (!PyBytes_Check(args[1])) {
    return PyErr_Format(PyExc_TypeError, "salt must be bytes, not %s", Py_TYPE(args[1])->tp_name);
  }
  if (!self.native.shares()) return PyBytes_FromStringAndSize(nullptr, 0);
  std::span<const uint8_t> salt = BytesOf(py::reinterpret_borrow<py::bytes>(args[1]));
  kv::BlockHash root = salt.empty() ? self.root : self.native.hasher().Root(salt);
  return ToBytes(HashFullBlocks(self.native.hasher(), root, ids.span())).release().ptr();
}

PyObject* CanEverHold(Ledger& self, Args args, Py_ssize_t) {
  int64_t num_prompt_tokens = 0;
  int64_t num_outputs = 0;
  if (!ReadCount(args[0], "num_prompt_tokens", 0, kMaxTokens, &num_prompt_tokens) ||
      !ReadCount(args[1], "num_outputs", 1, 1 << 20, &num_outputs)) {
    return nullptr;
  }
  return PyBool_FromLong(self.native.CanEverHold(num_prompt_tokens, num_outputs));
}

// Prompt tokens that are in the cache now, if more than `least`, else anything up to it; -1 with an
// error set.
int64_t NumCached(Ledger& self, PyObject* hashes, PyObject* num_prompt_tokens, int64_t least = 0) {
  int64_t num_tokens = 0;
  HashSource source;
  if (!ReadCount(num_prompt_tokens, "num_prompt_tokens", 0, kMaxTokens, &num_tokens) ||
      !source.Read(hashes)) {
    return -1;
  }
  if (least > 0) {
    // A longer run has the block after `least`; most others are told by this one look-up.
    int64_t next = least >> self.block_shift;
    if (next >= source.size()) return 0;
    if (!source.Check(next, next + 1)) return -1;
    if (!self.native.Caches(source.at(next))) return 0;
  }
  // In pieces, so that a miss at the start of a long prompt is cheap.
  constexpr int64_t kPiece = 32;
  kv::BlockHash piece[kPiece];
  int64_t num_found = 0;
  for (int64_t first = 0; first < source.size(); first += kPiece) {
    int64_t size = std::min(kPiece, source.size() - first);
    if (!source.Check(first, first + size)) return -1;
    for (int64_t i = 0; i < size; ++i) piece[i] = source.at(first + i);
    num_found += self.native.FindCached({piece, static_cast<size_t>(size)}, num_tokens - num_found);
    if (num_found < (first + size) << self.block_shift) break;
  }
  return num_found;
}

PyObject* FindCached(Ledger& self, Args args, Py_ssize_t) {
  int64_t num_found = NumCached(self, args[0], args[1]);
  return num_found < 0 ? nullptr : PyLong_FromLongLong(num_found);
}

PyObject* FindLongest(Ledger& self, Args args, Py_ssize_t) {
  int64_t window = 0;
  if (!ReadCount(args[1], "window", 1, kMaxTokens, &window)) return nullptr;
  if (!PyList_Check(args[0])) {
    return PyErr_Format(PyExc_TypeError, "prompts must be a list, not %s", Py_TYPE(args[0])->tp_name);
  }
  int64_t best = 0;
  int64_t most = -1;
  // The size is looked up anew each time because reading an item may run Python code.
  for (Py_ssize_t i = 0; i < std::min<int64_t>(window, PyList_GET_SIZE(args[0])); ++i) {
    auto item = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(args[0], i));
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 2) {
      return PyErr_Format(PyExc_TypeError, "prompt %zd is not a pair of hashes and tokens", i);
    }
    int64_t found = NumCached(self, PyTuple_GET_ITEM(item.ptr(), 0), PyTuple_GET_ITEM(item.ptr(), 1), most);
    if (found < 0) return nullptr;
    if (found > most) {
      best = i;
      most = found;
    }
  }
  return PyLong_FromLongLong(best);
}

PyObject* Hold(Ledger& self, Args args, Py_ssize_t) {
  sched::Ask ask;
  if (!ReadCount(args[1], "num_prompt_tokens", 0, kMaxTokens, &ask.num_prompt_tokens) ||
      !ReadCount(args[2], "num_outputs", 1, 1 << 20, &ask.num_outputs) ||
      !ReadCount(args[3], "max_tokens", 0, kMaxTokens, &ask.max_tokens)) {
    return nullptr;
  }
  int is_fixed = PyObject_IsTrue(args[4]);
  if (is_fixed < 0) return nullptr;
  ask.is_fixed = is_fixed != 0;
  if (!py::isinstance<LengthEstimator>(args[5])) {
    return PyErr_Format(PyExc_TypeError, "lengths must be a LengthEstimator, not %s",
                        Py_TYPE(args[5])->tp_name);
  }
  ask.lengths = py::cast<std::shared_ptr<LengthEstimator>>(py::handle(args[5]));
  int64_t num_full = self.native.shares() ? ask.num_prompt_tokens >> self.block_shift : 0;
  if (!self.Read(args[0], num_full)) return nullptr;
  ask.hashes = std::span(self.hashes).first(static_cast<size_t>(num_full));
  sched::HoldingId id = 0;
  if (!self.native.Admit(ask, &id)) Py_RETURN_NONE;
  return PyLong_FromLongLong(id);
}

PyObject* AppendTokens(Ledger& self, Args args, Py_ssize_t) {
  sched::HoldingId id = 0;
  int64_t output_index = 0;
  int64_t num_tokens = 0;
  if (!ReadInt(args[0], "holding", &id) || !ReadInt(args[1], "output_index", &output_index) ||
      !ReadCount(args[2], "num_tokens", 0, kMaxTokens, &num_tokens)) {
    return nullptr;
  }
  if (!self.native.Append(id, output_index, num_tokens)) {
    return PyErr_Format(PyExc_KeyError, "unknown or released holding %R, or no output %R of it", args[0],
                        args[1]);
  }
  Py_RETURN_NONE;
}

template <bool (KvLedger::*method)(sched::HoldingId)>
PyObject* OfHolding(Ledger& self, Args args, Py_ssize_t) {
  sched::HoldingId id = 0;
  if (!ReadInt(args[0], "holding", &id)) return nullptr;
  if (!(self.native.*method)(id)) return RaiseUnknownHolding(args[0]);
  Py_RETURN_NONE;
}
constexpr auto Publish = OfHolding<&KvLedger::Publish>;
constexpr auto Release = OfHolding<&KvLedger::Release>;

PyObject* NumCachedTokens(Ledger& self, Args args, Py_ssize_t) {
  sched::HoldingId id = 0;
  if (!ReadInt(args[0], "holding", &id)) return nullptr;
  std::optional<int64_t> found = self.native.NumCachedTokens(id);
  return found ? PyLong_FromLongLong(*found) : RaiseUnknownHolding(args[0]);
}

PyObject* Observe(LengthEstimator& self, Args args, Py_ssize_t) {
  int64_t length = 0;
  if (!ReadCount(args[0], "length", 0, kMaxTokens, &length)) return nullptr;
  int complete = PyObject_IsTrue(args[1]);
  if (complete < 0) return nullptr;
  self.Observe(length, complete != 0);
  Py_RETURN_NONE;
}

PyObject* Mean(LengthEstimator& self, Args args, Py_ssize_t) {
  int64_t limit = 0;
  if (!ReadCount(args[0], "limit", 0, kMaxTokens, &limit)) return nullptr;
  return PyFloat_FromDouble(self.Mean(static_cast<double>(limit)));
}

PyObject* Add(RankCounts& self, Args args, Py_ssize_t) {
  int64_t x = 0;
  int64_t amount = 0;
  if (!ReadCount(args[0], "x", 1, 1 << 30, &x) || !ReadInt(args[1], "amount", &amount)) return nullptr;
  self.Add(x, amount);
  Py_RETURN_NONE;
}

PyObject* At(RankCounts& self, Args args, Py_ssize_t) {
  int64_t x = 0;
  if (!ReadInt(args[0], "x", &x)) return nullptr;
  return PyLong_FromLongLong(self.At(x));
}

PyObject* UpTo(RankCounts& self, Args args, Py_ssize_t) {
  int64_t x = 0;
  if (!ReadInt(args[0], "x", &x)) return nullptr;
  return PyLong_FromLongLong(self.UpTo(x));
}

TWINJET_FAST(Ledger, "hash_tokens", HashTokens, 2, 2);
TWINJET_FAST(Ledger, "can_ever_hold", CanEverHold, 2, 2);
TWINJET_FAST(Ledger, "find_cached", FindCached, 2, 2);
TWINJET_FAST(Ledger, "find_longest", FindLongest, 2, 2);
TWINJET_FAST(Ledger, "hold", Hold, 6, 6);
TWINJET_FAST(Ledger, "append", AppendTokens, 3, 3);
TWINJET_FAST(Ledger, "publish", Publish, 1, 1);
TWINJET_FAST(Ledger, "release", Release, 1, 1);
TWINJET_FAST(Ledger, "num_cached_tokens", NumCachedTokens, 1, 1);
TWINJET_FAST(LengthEstimator, "observe", Observe, 2, 2);
TWINJET_FAST(LengthEstimator, "mean", Mean, 1, 1);
TWINJET_FAST(RankCounts, "add", Add, 2, 2);
TWINJET_FAST(RankCounts, "at", At, 1, 1);
TWINJET_FAST(RankCounts, "up_to", UpTo, 1, 1);

}  // namespace

void BindSched(py::module_& module) {
  py::class_<LengthEstimator, std::shared_ptr<LengthEstimator>> lengths(
      module, "LengthEstimator", "How long outputs get, learnt from finished requests.");
  lengths
      .def(py::init([](double prior_mean, double memory) {
             return std::make_shared<LengthEstimator>(CheckedPositive("prior_mean", prior_mean),
                                                      CheckedPositive("memory", memory));
           }),
           py::arg("prior_mean"), py::kw_only(), py::arg("memory") = 1000.0)
      .def_property_readonly("num_observed", &LengthEstimator::num_observed)
      .def(
          "survival",
          [](LengthEstimator& self, double start, double ahead) {
            return self.Survival(CheckedLength("start", start), CheckedLength("ahead", ahead));
          },
          py::arg("start"), py::arg("ahead"));
  AddFastMethods(lengths, {&ObserveDef, &MeanDef});

  py::class_<Ledger> ledger(module, "KvLedger",
                            "Which blocks an engine's running requests hold, seen from outside.");
  ledger
      .def(py::init(&MakeLedger), py::arg("num_blocks"), py::arg("block_size"), py::kw_only(),
           py::arg("prefix_cache"), py::arg("headroom"), py::arg("lookahead_tokens"), py::arg("sigmas"),
           py::arg("longest"))
      .def_property_readonly("num_blocks", [](const Ledger& self) { return self.native.num_blocks(); })
      .def_property_readonly("num_used_blocks",
                             [](const Ledger& self) { return self.native.num_used_blocks(); })
      .def_property_readonly("num_overflows", [](const Ledger& self) { return self.native.num_overflows(); })
      .def_property_readonly("is_predicting", [](const Ledger& self) { return self.native.is_predicting(); })
      .def("reset", [](Ledger& self) { return self.native.Reset(); })
      .def("check", [](const Ledger& self) {
        std::string wrong = self.native.Check();
        if (!wrong.empty()) throw std::runtime_error(wrong);
      });
  AddFastMethods(ledger, {&HashTokensDef, &CanEverHoldDef, &FindCachedDef, &FindLongestDef, &HoldDef,
                          &AppendTokensDef, &PublishDef, &ReleaseDef, &NumCachedTokensDef});

  py::class_<RankCounts> counts(module, "RankCounts",
                                "Of many lists that change by one item, how many have at least x.");
  counts.def(py::init<>());
  AddFastMethods(counts, {&AddDef, &AtDef, &UpToDef});
}

}  // namespace twinjet::bindings
