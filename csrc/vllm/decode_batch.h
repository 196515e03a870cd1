// DecodeBatch: the decodes of a vLLM scheduler's running list that are resident natively, and the
// two calls that serve them: Schedule() for the next step, Update() for a step's sampled tokens.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "vllm/row.h"

namespace twinjet::bindings {

// Makes vLLM's EngineCoreOutput structs by copying a blank one and filling member slots, which
// spares the keyword call of the constructor.
class OutputMaker {
 public:
  explicit OutputMaker(pybind11::type output_type);
  pybind11::object Make(pybind11::handle request_id, pybind11::handle token_ids) const;
  void SetTraceHeaders(pybind11::handle output, pybind11::handle value) const;
  void SetLogprobs(pybind11::handle output, pybind11::handle value) const;

 private:
  // A member slot of the struct; offset -1: set it through its name.
  struct Field {
    PyObject* name = nullptr;
    Py_ssize_t offset = -1;
  };
  Field FindField(pybind11::handle type, const char* name) const;
  static void Set(pybind11::handle output, const Field& field, pybind11::handle value);

  pybind11::object blank_;
  PyCFunction copy_ = nullptr;
  Field request_id_;
  Field new_token_ids_;
  Field trace_headers_;
  Field new_logprobs_;
};

struct Counters {
  uint64_t num_rows_scheduled = 0;
  uint64_t num_rows_updated = 0;
  uint64_t num_adopted = 0;
  uint64_t num_evicted = 0;
};

class DecodeBatch {
 public:
  // manager: kept alive as long as this object is.
  DecodeBatch(pybind11::object manager, RowContext context, pybind11::type output_type);

  // See the Python stub.
  pybind11::object Schedule(const pybind11::list& running, const pybind11::dict& sequences,
                            const pybind11::object& last_scheduled, int64_t token_budget, int64_t step,
                            bool shows_adapters);
  pybind11::tuple Merge(const pybind11::list& running, const pybind11::dict& num_scheduled,
                        const pybind11::tuple& native, const pybind11::dict& other_scheduled,
                        const pybind11::tuple& other);
  pybind11::tuple Update(const pybind11::dict& num_scheduled, const pybind11::dict& row_indices,
                         const pybind11::list& sampled, const pybind11::object& logprobs,
                         const pybind11::dict& requests);
  void Evict(const pybind11::object& request);
  void EvictAll();
  void WriteBackAll();

  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t template_version() const { return template_version_; }
  const Counters& counters() const { return counters_; }

 private:
  // What Schedule() found it can do; nothing is changed by planning but residency.
  struct Plan {
    pybind11::list remainder;  // running requests that stock schedules
  };
  // Makes positions_ follow `running`, adopting what can be.
  void Align(const pybind11::list& running, const pybind11::dict& sequences,
             const pybind11::object& last_scheduled, int64_t step);
  DecodeRow* TryAdopt(PyObject* request, const pybind11::dict& sequences,
                      const pybind11::object& last_scheduled, int64_t step);
  bool MakePlan(const pybind11::list& running, const pybind11::dict& sequences, int64_t token_budget,
                int64_t step, bool shows_adapters, Plan* plan);
  // Gives one due row of each adapter back to stock, which counts adapters by the requests that it sees.
  void ShowAdapters();
  // Blocks and tokens that stock will want for a running request that is not resident.
  int64_t StockTokens(pybind11::handle request) const;
  int64_t StockBlocks(pybind11::handle request, const pybind11::dict& sequences, int64_t num_tokens) const;
  bool IsDue(const DecodeRow& row) const;
  pybind11::object Commit(int64_t step, const Plan& plan);
  void RebuildTemplate();
  // Takes out the row at the pointer; its request is written back first if told to.
  void Drop(DecodeRow* row, bool write_back);
  DecodeRow* FindById(PyObject* request_id);
  // True if the row was served; false if the row must go to stock.
  bool UpdateRow(DecodeRow& row, int64_t num_scheduled, PyObject* tokens, bool* stopped);
  pybind11::list& OutputsOf(int64_t client);

  pybind11::object manager_;
  RowContext context_;
  OutputMaker outputs_;
  std::unordered_map<PyObject*, std::unique_ptr<DecodeRow>> rows_;  // by request
  pybind11::dict by_id_;                                            // request id -> address of its row
  std::vector<DecodeRow*> positions_;  // as the running list of the last Schedule(); null: not resident
  std::vector<DecodeRow*> due_;        // rows of the step being built
  std::vector<int64_t> shown_;         // adapters of which stock sees a row in that step
  // The step's requests as Python objects, copied out while the same rows are due again.
  std::vector<DecodeRow*> template_rows_;
  pybind11::dict template_scheduled_;
  pybind11::list template_ids_;
  int64_t template_version_ = 0;
  bool is_template_valid_ = false;
  // Of the Update() under way.
  std::vector<std::pair<int64_t, pybind11::list>> client_outputs_;
  Counters counters_;
};

}  // namespace twinjet::bindings
