// SPDX-License-Identifier: Apache-2.0
// The steps around the products that only move or combine rows.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// Planned rows, known on the device only.
struct RowRange {
  const int32_t* begin;
  const int32_t* end;
};

// packed[row, 0 .. columns) = x[row_token[row], 0 .. columns) for these rows.
cudaError_t gather_rows(ElementType element, const void* x, const int32_t* row_token,
                        const RowRange& rows, int64_t max_rows, int32_t columns, void* packed,
                        cudaStream_t stream);

// h[row, I] = activation(u[row, 2I]) of a gated expert, or of u[row, I].
cudaError_t activate_rows(ElementType element, Activation activation, const void* u,
                          const RowRange& rows, int64_t max_rows, int32_t intermediate, void* h,
                          cudaStream_t stream);

// output[t] = sum over j < k[t], in that order, of weights[t, j] * y[token_rows[t, j]], without
// those whose token_rows are -1. y is float32 when y_is_float, else of the element type.
cudaError_t combine_rows(ElementType element, bool y_is_float, const void* y,
                         const int32_t* token_rows, const float* weights, const int32_t* k,
                         int64_t tokens, int32_t capacity, int32_t hidden, void* output,
                         cudaStream_t stream);

}  // namespace adaptive_k::cuda
