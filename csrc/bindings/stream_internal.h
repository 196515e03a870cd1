// What the binding files of csrc/stream share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stream/output.h"
#include "stream/pump.h"

namespace twinjet::bindings {

// Throws ValueError for an empty string.
std::shared_ptr<const std::vector<std::string>> CheckedStops(std::vector<std::string> stops);
std::shared_ptr<const stream::OutputRules> MakeRules(std::vector<std::string> stop,
                                                     std::vector<int32_t> eos_token_ids,
                                                     std::vector<int32_t> stop_token_ids, int64_t min_tokens,
                                                     int64_t max_tokens, bool include_stop,
                                                     bool skip_special);
// (reason, token id or string or None, whether an end token), or None if it has not ended.
pybind11::object EndingOf(const stream::Ending& ending);

// A pump with what Python wants back of each request. wake_fd: an eventfd that a report is told by, or -1.
struct PyPump {
  explicit PyPump(int wake_fd);

  stream::Pump native;
  std::vector<pybind11::object> owners;  // by slot
  stream::StepOutputs step;

  const pybind11::object& OwnerOf(uint32_t slot) const { return owners[slot]; }
};

void BindPump(pybind11::module_& module);

}  // namespace twinjet::bindings
