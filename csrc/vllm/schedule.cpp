// DecodeBatch: residency and Schedule().
#include <algorithm>
#include <stdexcept>

#include "vllm/decode_batch.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

py::object Steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

PyObject* NewInt(int64_t value) {
  PyObject* number = PyLong_FromLongLong(value);
  if (!number) throw py::error_already_set();
  return number;
}

// ([block],), as vLLM passes the new blocks of its only group.
PyObject* NewBlockTuple(kv::BlockId block) {
  py::object list = Steal(PyList_New(1));
  PyList_SET_ITEM(list.ptr(), 0, NewInt(block));
  PyObject* tuple = PyTuple_New(1);
  if (!tuple) throw py::error_already_set();
  PyTuple_SET_ITEM(tuple, 0, list.release().ptr());
  return tuple;
}

}  // namespace

DecodeBatch::DecodeBatch(py::object manager, RowContext context, py::type output_type)
    : manager_(std::move(manager)), context_(std::move(context)), outputs_(std::move(output_type)) {}

void DecodeBatch::Drop(DecodeRow* row, bool write_back) {
  if (write_back) WriteBack(context_, *row);
  std::replace(positions_.begin(), positions_.end(), row, static_cast<DecodeRow*>(nullptr));
  is_template_valid_ = false;
  if (PyDict_DelItem(by_id_.ptr(), row->request_id.ptr()) < 0) throw py::error_already_set();
  ++counters_.num_evicted;
  rows_.erase(row->request.ptr());
}

void DecodeBatch::Evict(const py::object& request) {
  auto found = rows_.find(request.ptr());
  if (found != rows_.end()) Drop(found->second.get(), true);
}

void DecodeBatch::WriteBackAll() {
  for (auto& [request, row] : rows_) WriteBack(context_, *row);
}

void DecodeBatch::EvictAll() {
  WriteBackAll();
  counters_.num_evicted += rows_.size();
  by_id_.clear();
  positions_.clear();
  is_template_valid_ = false;
  rows_.clear();
}

DecodeRow* DecodeBatch::TryAdopt(PyObject* request, const py::dict& sequences,
                                 const py::object& last_scheduled, int64_t step) {
  auto row = std::make_unique<DecodeRow>();
  if (!Adopt(context_, request, sequences.ptr(), last_scheduled.ptr(), step, row.get())) return nullptr;
  py::object address = Steal(PyLong_FromVoidPtr(row.get()));
  if (PyDict_SetItem(by_id_.ptr(), row->request_id.ptr(), address.ptr()) < 0) throw py::error_already_set();
  ++counters_.num_adopted;
  return rows_.emplace(request, std::move(row)).first->second.get();
}

void DecodeBatch::Align(const py::list& running, const py::dict& sequences, const py::object& last_scheduled,
                        int64_t step) {
  // Requests leave the list anywhere but join it at the end, so the old order is nearly the new one.
  std::vector<DecodeRow*> old;
  old.swap(positions_);
  auto size = static_cast<size_t>(PyList_GET_SIZE(running.ptr()));
  positions_.reserve(size);
  size_t next = 0;
  size_t num_resident = 0;
  for (size_t i = 0; i < size; ++i) {
    PyObject* request = PyList_GET_ITEM(running.ptr(), static_cast<Py_ssize_t>(i));
    while (next < old.size() && !old[next]) ++next;
    DecodeRow* row = nullptr;
    if (next < old.size() && old[next]->request.ptr() == request) {
      row = old[next++];
    } else if (auto found = rows_.find(request); found != rows_.end()) {
      row = found->second.get();
    } else {
      row = TryAdopt(request, sequences, last_scheduled, step);
    }
    num_resident += row != nullptr;
    positions_.push_back(row);
  }
  if (num_resident != rows_.size()) {
    throw std::runtime_error("a request left the running list while it was resident");
  }
}

bool DecodeBatch::IsDue(const DecodeRow& row) const {
  // Nothing to do once the tokens in flight are sure to reach max_tokens or the model's length.
  bool is_ending = row.num_output_placeholders > 0 &&
                   row.num_computed_tokens + 2 - row.num_output_placeholders >= row.max_total_tokens;
  return !is_ending && row.num_tokens + row.num_output_placeholders - row.num_computed_tokens > 0 &&
         context_.max_model_len - row.num_computed_tokens - 1 > 0;
}

int64_t DecodeBatch::StockTokens(py::handle request) const {
  const Names& names = Names::Get();
  return std::max<int64_t>(0, IntAttribute(request, names.num_tokens_with_spec) +
                                  IntAttribute(request, names.num_output_placeholders) -
                                  IntAttribute(request, names.num_computed_tokens));
}

int64_t DecodeBatch::StockBlocks(py::handle request, const py::dict& sequences, int64_t num_tokens) const {
  const Names& names = Names::Get();
  py::object id = Steal(PyObject_GetAttr(request.ptr(), names.request_id));
  int64_t num_held = 0;
  if (PyObject* sequence = PyDict_GetItemWithError(sequences.ptr(), id.ptr())) {
    const kv::Sequence* blocks = context_.manager->FindSequence(PyLong_AsLongLong(sequence));
    if (blocks) num_held = blocks->num_blocks;
  }
  int64_t num_total = IntAttribute(request, names.num_computed_tokens) + num_tokens;
  return std::max<int64_t>(0, context_.manager->BlocksFor(num_total) - num_held);
}

void DecodeBatch::ShowAdapters() {
  shown_.clear();
  for (DecodeRow* row : positions_) {
    if (!row || row->adapter == 0 || !IsDue(*row)) continue;
    if (std::find(shown_.begin(), shown_.end(), row->adapter) != shown_.end()) continue;
    shown_.push_back(row->adapter);
    Drop(row, true);
  }
}

bool DecodeBatch::MakePlan(const py::list& running, const py::dict& sequences, int64_t token_budget,
                           int64_t step, bool shows_adapters, Plan* plan) {
  if (shows_adapters) ShowAdapters();
  int64_t num_due = 0;
  for (DecodeRow*& row : positions_) {
    if (!row) continue;
    row->is_scheduled = IsDue(*row);
    if (!row->is_scheduled) continue;
    if (context_.resends_tokens && row->last_step != step - 1) {
      Drop(row, true);  // its tokens must be sent again, which is stock's business
      continue;
    }
    ++num_due;
  }
  if (num_due > token_budget) return false;

  int64_t budget = token_budget;
  int64_t num_blocks = 0;
  bool is_contested = false;  // a request before this one may want all tokens that are left
  for (size_t i = 0; i < positions_.size(); ++i) {
    PyObject* request = PyList_GET_ITEM(running.ptr(), static_cast<Py_ssize_t>(i));
    DecodeRow* row = positions_[i];
    if (row && is_contested) {
      if (row->is_scheduled) --num_due;
      Drop(row, true);
      row = nullptr;
    }
    if (row) {
      if (!row->is_scheduled) continue;
      --num_due;
      --budget;
      num_blocks += row->num_computed_tokens + 1 > row->num_slots;
      continue;
    }
    plan->remainder.append(py::handle(request));
    int64_t num_tokens = StockTokens(request);
    is_contested = is_contested || num_tokens > budget - num_due;
    // An upper bound: stock may give one request less than `budget` allows and the next one more.
    num_blocks += StockBlocks(request, sequences, std::min(num_tokens, token_budget));
    budget -= std::min(num_tokens, budget);
  }
  const bool is_all_stocks = rows_.empty() && !plan->remainder.empty();
  return !is_all_stocks && num_blocks <= context_.manager->num_free_blocks();
}

void DecodeBatch::RebuildTemplate() {
  template_rows_ = due_;
  template_scheduled_ = py::dict();
  template_ids_ = py::list();
  py::object one = Steal(NewInt(1));
  for (DecodeRow* row : due_) {
    if (PyDict_SetItem(template_scheduled_.ptr(), row->request_id.ptr(), one.ptr()) < 0 ||
        PyList_Append(template_ids_.ptr(), row->request_id.ptr()) < 0) {
      throw py::error_already_set();
    }
  }
  is_template_valid_ = true;
  ++template_version_;
}

py::object DecodeBatch::Commit(int64_t step, const Plan& plan) {
  due_.clear();
  for (DecodeRow* row : positions_) {
    if (row && row->is_scheduled) due_.push_back(row);
  }
  if (!is_template_valid_ || due_ != template_rows_) RebuildTemplate();

  auto size = static_cast<Py_ssize_t>(due_.size());
  py::object new_blocks = Steal(PyList_New(size));
  py::object num_computed = Steal(PyList_New(size));
  py::object num_output = Steal(PyList_New(size));
  kv::BlockManager& manager = *context_.manager;
  for (Py_ssize_t i = 0; i < size; ++i) {
    DecodeRow& row = *due_[static_cast<size_t>(i)];
    PyList_SET_ITEM(num_computed.ptr(), i, NewInt(row.num_computed_tokens));
    PyList_SET_ITEM(num_output.ptr(), i, NewInt(row.num_output_tokens + row.num_output_placeholders));
    PyObject* blocks = Py_NewRef(Py_None);
    if (++row.num_computed_tokens > row.num_slots) {
      kv::Sequence* sequence = manager.FindSequence(row.sequence);
      kv::BlockManager::EnsureTable(*sequence, sequence->num_blocks + 1);
      Py_DECREF(blocks);
      blocks = NewBlockTuple(manager.TakeInto(*sequence));
      row.num_slots += manager.block_size();
    }
    PyList_SET_ITEM(new_blocks.ptr(), i, blocks);
    Publish(context_, row, std::min(row.num_computed_tokens, row.num_tokens));
    ++row.num_in_flight_tokens;
    row.num_output_placeholders += context_.is_async;
    row.last_step = step;
  }
  counters_.num_rows_scheduled += due_.size();
  py::object scheduled = Steal(PyDict_Copy(template_scheduled_.ptr()));
  py::object ids = Steal(PyList_GetSlice(template_ids_.ptr(), 0, size));
  py::object remainder = plan.remainder.empty() ? py::object(py::none()) : py::object(plan.remainder);
  return py::make_tuple(remainder, scheduled, py::make_tuple(ids, new_blocks, num_computed, num_output));
}

py::object DecodeBatch::Schedule(const py::list& running, const py::dict& sequences,
                                 const py::object& last_scheduled, int64_t token_budget, int64_t step,
                                 bool shows_adapters) {
  Align(running, sequences, last_scheduled, step);
  Plan plan;
  if (!MakePlan(running, sequences, token_budget, step, shows_adapters, &plan)) return py::none();
  return Commit(step, plan);
}

py::tuple DecodeBatch::Merge(const py::list& running, const py::dict& num_scheduled, const py::tuple& native,
                             const py::dict& other_scheduled, const py::tuple& other) {
  constexpr size_t kNumLists = 4;  // request ids first, then what CachedRequestData lists by request
  std::vector<py::list> merged(kNumLists);
  py::dict merged_scheduled;
  auto take_lists = [&](const py::tuple& from, Py_ssize_t index) {
    for (size_t list = 0; list < kNumLists; ++list) {
      PyObject* item = PyList_GET_ITEM(PyTuple_GET_ITEM(from.ptr(), static_cast<Py_ssize_t>(list)), index);
      if (PyList_Append(merged[list].ptr(), item) < 0) throw py::error_already_set();
    }
  };
  auto take = [&](const py::tuple& from, Py_ssize_t index, const py::dict& scheduled) {
    take_lists(from, index);
    PyObject* id = PyList_GET_ITEM(PyTuple_GET_ITEM(from.ptr(), 0), index);
    PyObject* count = PyDict_GetItemWithError(scheduled.ptr(), id);
    if (!count || PyDict_SetItem(merged_scheduled.ptr(), id, count) < 0) {
      throw std::runtime_error("a cached request was not scheduled");
    }
  };
  PyObject* other_ids = PyTuple_GET_ITEM(other.ptr(), 0);
  Py_ssize_t num_other = PyList_GET_SIZE(other_ids);
  Py_ssize_t next_native = 0;
  Py_ssize_t next_other = 0;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (DecodeRow* row = positions_[i]) {
      if (row->is_scheduled) take(native, next_native++, num_scheduled);
      continue;
    }
    if (next_other == num_other) continue;
    py::object id = Steal(PyObject_GetAttr(PyList_GET_ITEM(running.ptr(), static_cast<Py_ssize_t>(i)),
                                           Names::Get().request_id));
    int same = PyObject_RichCompareBool(PyList_GET_ITEM(other_ids, next_other), id.ptr(), Py_EQ);
    if (same < 0) throw py::error_already_set();
    if (same) take(other, next_other++, other_scheduled);
  }
  // Resumed requests; in the dict they stand among the new ones, in the order of admission.
  for (; next_other < num_other; ++next_other) take_lists(other, next_other);
  if (PyDict_Merge(merged_scheduled.ptr(), other_scheduled.ptr(), 0) < 0) throw py::error_already_set();
  return py::make_tuple(merged_scheduled, py::make_tuple(merged[0], merged[1], merged[2], merged[3]));
}

}  // namespace twinjet::bindings
