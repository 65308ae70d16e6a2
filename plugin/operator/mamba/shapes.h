// SPDX-License-Identifier: Apache-2.0
// The sizes of a layer by its inputs' shapes.
#pragma once

#include <cstdint>

#include "operator/mamba/description.h"
#include "operator/shapes.h"

namespace adaptive_k {

// -1 where they are not yet known.
struct MambaSizes {
  int64_t tokens = -1;     // T, over all sequences
  int64_t sequences = -1;  // S
  int64_t slots = -1;
  int64_t channels = -1;  // of the convolution: heads * head_dim + 2 * n_groups * state_size
  int64_t taps = -1;      // K, at least 2
  int64_t heads = -1;
  int64_t head_dim = -1;    // P
  int64_t state_size = -1;  // N
};

// Throws std::invalid_argument with a sentence that names the input.
MambaSizes check_shapes(const MambaParams& params, const Shapes<Mamba>& shapes);

}  // namespace adaptive_k
