#include "kv_convert.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace twinjet::bindings {
namespace {

constexpr int64_t kMaxToken = std::numeric_limits<int32_t>::max();

bool RaiseTokenRange(int64_t index) {
  PyErr_Format(PyExc_ValueError, "token id at index %lld is out of range; expected 0..2147483647",
               static_cast<long long>(index));
  return false;
}

// The value of a one-digit int (all token ids below 2^30) without a call into the interpreter.
inline bool ReadSmall(PyObject* object, int64_t* value) {
  if (!PyLong_CheckExact(object)) return false;
#if PY_VERSION_HEX >= 0x030C0000
  auto* number = reinterpret_cast<PyLongObject*>(object);
  if (!PyUnstable_Long_IsCompact(number)) return false;
  *value = PyUnstable_Long_CompactValue(number);
  return true;
#else
  Py_ssize_t size = Py_SIZE(object);
  if (size == 1) {
    *value = reinterpret_cast<PyLongObject*>(object)->ob_digit[0];
    return true;
  }
  *value = 0;
  return size == 0;
#endif
}

// 1: read; 0: an int beyond 64 bits, no error set; -1: not an int, error set.
int ReadAny(PyObject* object, const char* what, int64_t* value) {
  if (ReadSmall(object, value)) return 1;
  PyObject* number = PyLong_Check(object) ? Py_NewRef(object) : nullptr;
  if (!number) {
    number = PyIndex_Check(object) ? PyNumber_Index(object) : nullptr;
    if (!number) {
      if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %s", what, Py_TYPE(object)->tp_name);
      }
      return -1;
    }
  }
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(number, &overflow);
  Py_DECREF(number);
  return overflow ? 0 : 1;
}

// The items of a list or tuple; false for anything else. An empty list has no item array at all.
bool Items(PyObject* object, PyObject* const** items, Py_ssize_t* size) {
  if (PyList_Check(object)) {
    *size = PyList_GET_SIZE(object);
    *items = reinterpret_cast<PyListObject*>(object)->ob_item;
    return true;
  }
  if (PyTuple_Check(object)) {
    *size = PyTuple_GET_SIZE(object);
    *items = reinterpret_cast<PyTupleObject*>(object)->ob_item;
    return true;
  }
  return false;
}

// Calls visit(item, index) for each item until it returns false. The size is looked up anew each
// time because visit may run Python code that changes the list.
template <typename Visit>
bool ForEachItem(PyObject* object, const Visit& visit) {
  PyObject* const* items = nullptr;
  Py_ssize_t size = 0;
  for (Py_ssize_t i = 0; Items(object, &items, &size), i < size; ++i) {
    PyObject* item = Py_NewRef(items[i]);
    bool going = visit(item, i);
    Py_DECREF(item);
    if (!going) return false;
  }
  return true;
}

enum class Element { kOther, kInt32, kUInt32, kInt64 };

Element ElementOf(const Py_buffer& buffer) {
  const char* format = buffer.format ? buffer.format : "B";
  if (*format == '<' || *format == '=' || *format == '@') ++format;
  if (std::strlen(format) != 1) return Element::kOther;
  if (std::strchr("il", *format) && buffer.itemsize == 4) return Element::kInt32;
  if (std::strchr("IL", *format) && buffer.itemsize == 4) return Element::kUInt32;
  if (std::strchr("lqn", *format) && buffer.itemsize == 8) return Element::kInt64;
  return Element::kOther;
}

// A contiguous one-dimensional integer buffer. The caller releases it.
bool GetBuffer(PyObject* object, const char* what, Py_buffer* buffer, Element* element) {
  if (PyObject_GetBuffer(object, buffer, PyBUF_ND | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s must be contiguous", what);
    return false;
  }
  *element = ElementOf(*buffer);
  if (*element == Element::kOther || buffer->ndim != 1) {
    PyErr_Format(PyExc_TypeError, "%s must be one-dimensional and of int32 or int64, not %d-dimensional '%s'",
                 what, buffer->ndim, buffer->format ? buffer->format : "B");
    PyBuffer_Release(buffer);
    return false;
  }
  return true;
}

// Any list, tuple or integer buffer as 64-bit ints.
bool ReadInts(PyObject* object, const char* what, std::vector<int64_t>* values) {
  PyObject* const* items = nullptr;
  Py_ssize_t size = 0;
  if (Items(object, &items, &size)) {
    values->reserve(static_cast<size_t>(size));
    return ForEachItem(object, [&](PyObject* item, Py_ssize_t) {
      int64_t value = 0;
      if (!ReadInt(item, what, &value)) return false;
      values->push_back(value);
      return true;
    });
  }
  if (!PyObject_CheckBuffer(object)) {
    PyErr_Format(PyExc_TypeError, "%s must come as a list, tuple or integer array, not %s", what,
                 Py_TYPE(object)->tp_name);
    return false;
  }
  Py_buffer buffer;
  Element element;
  if (!GetBuffer(object, what, &buffer, &element)) return false;
  auto count = static_cast<size_t>(buffer.shape[0]);
  if (element == Element::kInt64) {
    const auto* source = static_cast<const int64_t*>(buffer.buf);
    values->assign(source, source + count);
  } else if (element == Element::kInt32) {
    const auto* source = static_cast<const int32_t*>(buffer.buf);
    values->assign(source, source + count);
  } else {
    const auto* source = static_cast<const uint32_t*>(buffer.buf);
    values->assign(source, source + count);
  }
  PyBuffer_Release(&buffer);
  return true;
}

template <typename Make, typename Set>
PyObject* BlockSequence(std::span<const kv::BlockId> blocks, const Make& make, const Set& set) {
  PyObject* sequence = make(static_cast<Py_ssize_t>(blocks.size()));
  if (!sequence) return nullptr;
  for (size_t i = 0; i < blocks.size(); ++i) {
    PyObject* id = PyLong_FromLong(blocks[i]);
    if (!id) {
      Py_DECREF(sequence);
      return nullptr;
    }
    set(sequence, static_cast<Py_ssize_t>(i), id);
  }
  return sequence;
}

}  // namespace

bool ReadInt(PyObject* object, const char* what, int64_t* value) {
  int outcome = ReadAny(object, what, value);
  if (outcome == 0) PyErr_Format(PyExc_ValueError, "%s is out of range: %R", what, object);
  return outcome == 1;
}

bool ReadSequenceId(PyObject* object, kv::SequenceId* id) {
  int outcome = ReadAny(object, "sequence", id);
  if (outcome == 0) PyErr_Format(PyExc_KeyError, "unknown or freed sequence %R", object);
  return outcome == 1;
}

bool ReadToken(PyObject* object, int32_t* token) {
  int64_t value = 0;
  int outcome = ReadAny(object, "token id", &value);
  if (outcome < 0) return false;
  if (outcome == 0 || value < 0 || value > kMaxToken) {
    PyErr_Format(PyExc_ValueError, "token id %R is out of range; expected 0..2147483647", object);
    return false;
  }
  *token = static_cast<int32_t>(value);
  return true;
}

bool ReadSequenceIds(PyObject* object, std::vector<kv::SequenceId>* ids) {
  return ReadInts(object, "sequences", ids);
}

bool ReadBlockIds(PyObject* object, std::vector<kv::BlockId>* blocks) {
  if (!object || object == Py_None) return true;
  std::vector<int64_t> values;
  if (!ReadInts(object, "block ids", &values)) return false;
  blocks->reserve(values.size());
  for (int64_t value : values) {
    // Beyond int32 is no block either; -1 is refused by the manager.
    bool fits = value >= 0 && value <= std::numeric_limits<kv::BlockId>::max();
    blocks->push_back(fits ? static_cast<kv::BlockId>(value) : kv::kNoBlock);
  }
  return true;
}

bool TokenIds::Read(PyObject* object) {
  if (PyList_Check(object) || PyTuple_Check(object)) return ReadItems(object);
  if (PyObject_CheckBuffer(object)) return ReadBuffer(object);
  PyErr_Format(PyExc_TypeError, "tokens must be a list, tuple or integer array, not %s",
               Py_TYPE(object)->tp_name);
  return false;
}

bool TokenIds::ReadItems(PyObject* object) {
  PyObject* const* items = nullptr;
  Py_ssize_t size = 0;
  Items(object, &items, &size);
  converted_.resize(static_cast<size_t>(size));
  // Ordinary ints first: this loop runs no Python code, so the list cannot change under it.
  Py_ssize_t i = 0;
  for (int64_t value = 0; i < size && ReadSmall(items[i], &value) && value >= 0; ++i) {
    converted_[static_cast<size_t>(i)] = static_cast<int32_t>(value);
  }
  if (i < size) {
    converted_.clear();
    bool read = ForEachItem(object, [&](PyObject* item, Py_ssize_t index) {
      int64_t value = 0;
      int outcome = ReadAny(item, "token id", &value);
      if (outcome < 0) return false;
      if (outcome == 0 || value < 0 || value > kMaxToken) return RaiseTokenRange(index);
      converted_.push_back(static_cast<int32_t>(value));
      return true;
    });
    if (!read) return false;
  }
  tokens_ = converted_;
  return true;
}

bool TokenIds::ReadBuffer(PyObject* object) {
  Element element;
  if (!GetBuffer(object, "tokens", &buffer_, &element)) {
    buffer_.obj = nullptr;
    return false;
  }
  auto count = static_cast<size_t>(buffer_.shape[0]);
  const void* data = buffer_.buf;
  if (element == Element::kInt64) {
    converted_.resize(count);
    int64_t outside = 0;
    const auto* source = static_cast<const int64_t*>(data);
    for (size_t i = 0; i < count; ++i) {
      outside |= source[i] & ~kMaxToken;
      converted_[i] = static_cast<int32_t>(source[i]);
    }
    if (outside != 0) {
      auto found = std::find_if(source, source + count, [](int64_t v) { return v < 0 || v > kMaxToken; });
      return RaiseTokenRange(found - source);
    }
    tokens_ = converted_;
    return true;
  }
  // An id above 2^31-1 in a uint32 buffer has the sign bit of an int32.
  tokens_ = {static_cast<const int32_t*>(data), count};
  int32_t signs = 0;
  for (int32_t token : tokens_) signs |= token;
  if (signs >= 0) return true;
  auto found = std::find_if(tokens_.begin(), tokens_.end(), [](int32_t token) { return token < 0; });
  return RaiseTokenRange(found - tokens_.begin());
}

bool HashSource::Read(PyObject* object) {
  if (!object || object == Py_None) return true;
  Py_ssize_t size = 0;
  if (PyBytes_Check(object)) {
    if (PyBytes_GET_SIZE(object) % kv::BlockHash::kBytes != 0) {
      PyErr_Format(PyExc_ValueError, "hashes must hold 16 bytes a block, not %zd bytes in all",
                   PyBytes_GET_SIZE(object));
      return false;
    }
    bytes_ = PyBytes_AS_STRING(object);
    size_ = PyBytes_GET_SIZE(object) / kv::BlockHash::kBytes;
    return true;
  }
  if (Items(object, &items_, &size)) {
    size_ = size;
    return true;
  }
  PyErr_Format(PyExc_TypeError, "hashes must be bytes or a list or tuple of bytes, not %s",
               Py_TYPE(object)->tp_name);
  return false;
}

bool HashSource::Check(int64_t first, int64_t last) const {
  if (!items_) return true;
  for (int64_t i = first; i < std::min(last, size_); ++i) {
    if (!PyBytes_Check(items_[i])) {
      PyErr_Format(PyExc_TypeError, "hashes must be bytes, not %s", Py_TYPE(items_[i])->tp_name);
      return false;
    }
    if (PyBytes_GET_SIZE(items_[i]) < kv::BlockHash::kBytes) {
      PyErr_Format(PyExc_ValueError, "a block hash has %zd bytes; expected at least 16",
                   PyBytes_GET_SIZE(items_[i]));
      return false;
    }
  }
  return true;
}

PyObject* BlockTuple(std::span<const kv::BlockId> blocks) {
  return BlockSequence(blocks, PyTuple_New,
                       [](PyObject* t, Py_ssize_t i, PyObject* id) { PyTuple_SET_ITEM(t, i, id); });
}

PyObject* BlockList(std::span<const kv::BlockId> blocks) {
  return BlockSequence(blocks, PyList_New,
                       [](PyObject* l, Py_ssize_t i, PyObject* id) { PyList_SET_ITEM(l, i, id); });
}

PyObject* RaiseUnknownSequence(kv::SequenceId id) {
  return PyErr_Format(PyExc_KeyError, "unknown or freed sequence %lld", static_cast<long long>(id));
}

PyObject* RaiseStatus(kv::Status status, kv::SequenceId id) {
  using kv::Status;
  const char* message = nullptr;
  switch (status) {
    case Status::kOk:
    case Status::kNoRoom:
      return nullptr;
    case Status::kUnknownSequence:
      if (id >= 0) return RaiseUnknownSequence(id);
      PyErr_SetString(PyExc_KeyError, "unknown or freed sequence");
      return nullptr;
    case Status::kTooManySequences:
      PyErr_SetString(PyExc_RuntimeError, "too many live sequences; at most 2**24");
      return nullptr;
    case Status::kNeverFits:
      message = "needs more blocks than exist";
      break;
    case Status::kDuplicate:
      message = "a sequence is named twice in one batch";
      break;
    case Status::kBadBlock:
      message = "block id out of range, or the null block";
      break;
    case Status::kNotCached:
      message = "a matched block is no longer cached; match again";
      break;
    case Status::kNotDetached:
      message = "a block is given back more often than it was detached";
      break;
    case Status::kBadCount:
      message = "count out of range: negative, zero, or past the sequence's end";
      break;
    case Status::kTooFewHashes:
      message = "fewer hashes than full blocks, or for other tokens";
      break;
    case Status::kNotEmpty:
      message = "matched blocks are only for a sequence that has no blocks yet";
      break;
    case Status::kWrongKind:
      message = "publish() is for sequences with token ids, publish_hashes() for open() ones";
      break;
  }
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

}  // namespace twinjet::bindings
