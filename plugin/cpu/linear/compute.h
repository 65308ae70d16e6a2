// SPDX-License-Identifier: Apache-2.0
// A dense product on a CPU, over plain pointers, by the kernels that the experts have: activations
// are rounded as theirs are. Runs in the TBB arena of the calling thread. A token's output does not
// depend, to the bit, on the other tokens of the call.
#pragma once

#include <cstdint>

#include "operator/weight_format.h"

namespace adaptive_k::cpu {

// All arrays are row-major and contiguous.
struct LinearArguments {
  WeightFormat weight_format;
  ActivationFormat activation_format;
  int64_t tokens, in_features, out_features;
  int64_t group_size;   // of quantised weights; 0 is one scale a row
  const float* input;   // [tokens, in_features]
  const void* weight;   // [out_features, in_features]
  const float* scales;  // [out_features, in_features / group_size] or null
};

// output [tokens, out_features] = input times the weight, transposed.
void linear(const LinearArguments& arguments, float* output);

}  // namespace adaptive_k::cpu
