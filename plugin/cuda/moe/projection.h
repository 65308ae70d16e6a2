// SPDX-License-Identifier: Apache-2.0
// One of the two products of a layer's planned rows with their experts' weights, as the ways to
// compute it (decode.h, mixed.h) take it.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// Which rows belong to which of the experts whose weights are given; from plan().
struct PlannedRows {
  const int32_t* offsets;     // [num_experts + 1]
  const int32_t* active;      // [num_experts]
  const int32_t* num_active;  // [1]
  const int32_t* row_token;   // [rows]
  int32_t num_experts;
  int64_t max_rows;  // T * capacity; the true number is known on the device only
};

// up:   out[row, I] = activation(x[row_token[row], H] . w[expert]^T), in the element type
// down: out[row, H] = x[row, I] . w[expert]^T
struct Projection {
  bool up;
  ElementType element;
  WeightFormat format;    // kAsHiddenStates, or a quantised one
  Activation activation;  // of up
  PlannedRows rows;
  int32_t k;           // of x's rows
  int32_t neurons;     // of out's rows
  int32_t group_size;  // k for one scale a row
  const void *x, *w, *scales;
  void* out;

  bool gated() const { return up && is_gated(activation); }
  int32_t weight_rows() const { return neurons * (gated() ? 2 : 1); }  // of an expert
};

}  // namespace adaptive_k::cuda
