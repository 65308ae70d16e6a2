// SPDX-License-Identifier: Apache-2.0
// The loops over weights, one set for each instruction set, chosen at run time.
//
// Every product of a token's row with a weight row is summed in one order, whatever loop computes
// it: element k goes to lane k % lanes of one vector accumulator, lanes take their elements in
// rising order by fused multiply-add, and the lanes are added by one fixed tree at the end. So a
// token's result has the same bits alone and in any batch, in the loop for few tokens and in the
// one for many.
//
// Activations are packed: a tile of m <= tile_rows rows is stored [padded K / lanes][m][lanes],
// zeros after K.
#pragma once

#include <cstdint>

#include "adaptive_k/params.h"

namespace adaptive_k::cpu {

// Weight rows are processed in panels of this many: 16 neurons of a gated expert (16 gate rows and
// 16 up rows), 32 neurons of a plain one, or 32 columns of the output.
constexpr int kPanelRows = 32;

// A tile of packed activations and the number of rows in it.
struct Tile {
  const float* x;
  int rows;
};

struct Kernels {
  const char* name;
  int lanes;
  int tile_rows;

  // Packs m rows of K floats into one tile.
  void (*pack)(const float* const* rows, int m, int64_t K, float* packed);

  // c[i * kPanelRows + r] = dot(row i of the tiles, weight_rows[r]), r < num_rows. num_rows is a
  // multiple of 8 up to kPanelRows. `few` reads the weights straight from memory, once for each
  // tile; `many` converts and packs them in blocks that stay in cache.
  void (*few)(const Tile* tiles, int num_tiles, const void* const* weight_rows, int num_rows,
              int64_t K, WeightFormat format, float* c);
  void (*many)(const Tile* tiles, int num_tiles, const void* const* weight_rows, int num_rows,
               int64_t K, WeightFormat format, float* c);

  // Applies the activation to `rows` rows of a panel and writes neurons first .. first + count - 1
  // into a packed tile of padded length padded_I; neurons at or beyond I become zeros. Gated
  // panels hold the gates in columns 0 .. kPanelRows / 2 - 1.
  void (*activate)(Activation activation, const float* c, int rows, int64_t first, int count,
                   int64_t I, int64_t padded_I, float* tile);

  // out[0 .. n) = sum over j of weights[j] * y[j][0 .. n), in the order of j; n <= kPanelRows.
  void (*combine)(const float* const* y, const float* weights, int k, int n, float* out);
};

// The best set that this machine runs, or the one that the environment variable ADAPTIVE_K_ISA
// names (portable, avx2, avx512). Throws std::invalid_argument when it cannot be had.
const Kernels& kernels();

extern const Kernels kPortableKernels;
#if defined(ADAPTIVE_K_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace adaptive_k::cpu
