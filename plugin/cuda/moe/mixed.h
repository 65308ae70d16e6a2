// SPDX-License-Identifier: Apache-2.0
// The expert products for many tokens with int8 or int4 weights: tensor-core tiles whose weights
// become 16-bit numbers on the way from shared memory to the registers.
#pragma once

#include "cuda/moe/projection.h"

namespace adaptive_k::cuda {

// A tile's rows all belong to one expert.
struct RowTile {
  int32_t expert;
  int32_t first_row;
  int32_t num_rows;
};

// No more tiles than this.
int64_t mixed_max_tiles(int64_t max_rows, int32_t num_experts);

// The tiles of the planned rows, in order, and their number. For mixed().
cudaError_t mixed_tiles(const PlannedRows& rows, RowTile* tiles, int32_t* num_tiles,
                        cudaStream_t stream);

// For float16 and bfloat16 with quantised weights; the result is of the element type.
cudaError_t mixed(const Projection& projection, const RowTile* tiles, const int32_t* num_tiles,
                  cudaStream_t stream);

}  // namespace adaptive_k::cuda
