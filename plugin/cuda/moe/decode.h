// SPDX-License-Identifier: Apache-2.0
// The expert products for few tokens: matrix-vector products that stream the chosen experts'
// weights and nothing else.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// Which rows belong to which expert; from plan().
struct PlannedRows {
  const int32_t* offsets;     // [E + 1]
  const int32_t* active;      // [E]
  const int32_t* num_active;  // [1]
  const int32_t* row_token;   // [rows]
  int32_t num_experts;
  int64_t max_rows;  // T * capacity; the true number is known on the device only
};

// h[row, I] = activation(x[row_token[row], H] . up[expert]^T), in the element type.
struct DecodeUpArguments {
  ElementType element;
  WeightStorage storage;
  Activation activation;
  int32_t hidden, intermediate, group_size;
  PlannedRows rows;
  const void* x;
  const void* up;
  const void* up_scales;
  void* h;
};

// y[row, H] = h[row, I] . down[expert]^T, in float32 (in the element type from mixed_down()).
struct DecodeDownArguments {
  ElementType element;
  WeightStorage storage;
  int32_t hidden, intermediate, group_size;
  PlannedRows rows;
  const void* h;
  const void* down;
  const void* down_scales;
  void* y;
};

cudaError_t decode_up(const DecodeUpArguments& arguments, cudaStream_t stream);
cudaError_t decode_down(const DecodeDownArguments& arguments, cudaStream_t stream);

}  // namespace adaptive_k::cuda
