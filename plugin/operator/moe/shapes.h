// SPDX-License-Identifier: Apache-2.0
// The sizes of a layer by its inputs' shapes. All functions throw std::invalid_argument with a
// sentence that names the input.
#pragma once

#include <cstdint>

#include "operator/moe/description.h"
#include "operator/shapes.h"

namespace adaptive_k {

// -1 where they are not yet known.
struct MoeSizes {
  int64_t tokens = -1, hidden = -1, experts = -1, policies = -1, choices = -1, intermediate = -1;
  int64_t local_experts = -1;  // whose weights are given: all, or those of a range
  int64_t group_size = 0;      // of quantised weights; 0: one scale a row, or not yet known
};

// Shapes of weights are in values. Inputs without a shape are not looked at: routing alone has no
// hidden states and no weights.
MoeSizes check_shapes(const MoeParams& params, const Shapes<Moe>& shapes);

// What the CPU's kernels do not compute: formats, and quantised rows of these sizes.
void check_cpu_weights(const MoeParams& params, const MoeSizes& sizes);

}  // namespace adaptive_k
