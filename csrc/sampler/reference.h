// The specification written for reading: whole-row sorts, no vectors, no shortcuts, and memory
// allocated at will. Tests hold every other implementation against it.
#pragma once

#include "sampler/row.h"

namespace twinjet::sampler {

void ReferenceDrawRow(const RowInput& input, RowOutput* output);

}  // namespace twinjet::sampler
