// SPDX-License-Identifier: Apache-2.0
// Where everything lies in the scratch memory of one launch.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// Offsets in bytes. What is not used on a path has no room there.
struct Workspace {
  size_t experts;       // [T, capacity] int32
  size_t weights;       // [T, capacity] float32
  size_t read;          // [E] bytes: the experts that a step with sharing tokens reads
  size_t chunk_counts;  // [E, chunks + 1] int32
  size_t offsets;       // [E + 1] int32
  size_t active;        // [E] int32
  size_t num_active;    // [1] int32
  size_t row_token;     // [rows] int32
  size_t token_rows;    // [T, capacity] int32
  size_t h;             // [rows, I] element type
  size_t y;             // [rows, H], float32 when decoding, else element type
  size_t x;             // prefill: [rows, H] element type, in y's place
  size_t u;             // prefill of gated experts: [rows, 2I] element type
  size_t gemm;          // prefill: the grouped product's own
  size_t tiles;         // prefill with quantised weights: [mixed_max_tiles()] RowTile
  size_t num_tiles;     // the same: [1] int32
  size_t size;
};

// The path that a launch takes: kDecode or kPrefill.
Path choose_path(const MoeParams& params, const MoeShape& shape);

Workspace lay_out(const MoeParams& params, const MoeShape& shape, Path path);

}  // namespace adaptive_k::cuda
