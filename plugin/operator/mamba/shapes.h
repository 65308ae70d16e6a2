// SPDX-License-Identifier: Apache-2.0
// The shapes of Mamba2's inputs and the sizes that they give.
#pragma once

#include <cstdint>

#include "operator/mamba/params.h"
#include "operator/moe/shapes.h"

namespace adaptive_k::cpu {

// The most taps of the convolution.
constexpr int64_t kMaxTaps = kMambaMaxTaps;

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

// The operator's array inputs, in order.
enum class MambaInput : int {
  kConvInput,
  kDt,
  kSubsequenceBegins,
  kPastLens,
  kStateSlots,
  kConvWeight,
  kConvBias,
  kA,
  kD,
  kDtBias,
  kConvState,
  kSsmState,
  kCount,
};
constexpr int kMambaInputs = static_cast<int>(MambaInput::kCount);
const char* mamba_input_name(int index);

// The sizes by the inputs' shapes. Throws std::invalid_argument with a sentence that names the
// operator and the input.
MambaSizes check_mamba_shapes(const MambaParams& params, const Shape (&shapes)[kMambaInputs]);

}  // namespace adaptive_k::cpu
