// SPDX-License-Identifier: Apache-2.0
// The loops over weights, one set for each instruction set (machine.h).
//
// Every product of a token's row with a weight row is summed in one order, whatever else is
// computed beside it: K is taken in parts of kPart elements; in a part, element k goes to lane k %
// lanes of one vector accumulator, lanes take their elements in rising order by fused multiply-add
// and are added by one fixed tree; the parts' sums are added in rising order. So a token's result
// has the same bits alone and in any batch. (AMX has another order with that property: see
// amx.cpp, which also says how it packs activations.)
//
// A quantised weight is its value times its scale, rounded to float32 as it is read, wherever that
// is.
//
// Activations are packed: a tile of m <= tile_rows rows is stored [padded K / lanes][m][lanes],
// zeros after K.
//
// With activations in int8 both operands are integers. A row of activations is taken in blocks,
// each with a scale (quantise.h). The products of a block are summed as integers, which is exact;
// times the scales they are added as above, over rising blocks. A tile of m rows is stored as its
// values, [m][stride], then [m][blocks] scales and [m][blocks] sums of values (for more than a few
// rows AMX has another order). All instruction sets have the same order of additions, so that with
// fused multiply-adds they give the same bits.
#pragma once

#include <cstdint>

#include "operator/moe/params.h"

namespace adaptive_k::cpu {

constexpr int kPart = 1024;

// Weight rows are processed in panels of this many: 16 neurons of a gated expert (16 gate rows,
// then 16 up rows) or 32 neurons of a plain one.
constexpr int kPanelRows = 32;

// The largest tile_rows.
constexpr int kMaxTileRows = 16;

// A tile of packed activations, floats or what the kernels pack them as, and the number of rows.
struct Tile {
  const void* x;
  int rows;
};

// Two neighbours of a row of int4, the one with the even index in the low half.
struct Int4Pair {
  uint8_t bits;
};

// Kernels take weight rows by groups of this many; a product is told of so many groups that come
// after its own.
constexpr int kGroupRows = 16;
constexpr int kNextGroups = 4;

// The weight rows of one product, wherever they lie.
struct Weights {
  WeightFormat format;
  int num_rows;             // a multiple of kGroupRows
  const void* const* rows;  // [num_rows] of K values each
  // Of quantised formats alone: each row's scales, one for each group_size values. A group is the
  // whole row or a multiple of 32 values; K is a multiple of 16 for int8 and of 32 for int4.
  const float* const* scales;
  int64_t group_size;
  // What the thread is likely to read next: the starts of groups of kGroupRows, or null.
  const void* next[kNextGroups];
};

// The length of blocks of activations for weights in groups, and for weights with a scale a row.
constexpr int kActivationBlock = 128;
constexpr int kLongActivationBlock = 256;

// The blocks in which a row of K activations becomes int8, never across the weights' groups. The
// last may be shorter. Always inlined: files of different instruction sets have it.
struct ActivationBlocks {
  int64_t K, length, count;
  int64_t stride;  // bytes of a row's values

  __attribute__((always_inline)) ActivationBlocks(int64_t K, int64_t group_size)
      : K(K),
        length(group_size >= K                      ? kLongActivationBlock
               : group_size % kActivationBlock == 0 ? kActivationBlock
               : group_size < kActivationBlock      ? group_size
                                                    : 32),
        count((K + length - 1) / length),
        stride((K + 63) / 64 * 64) {}

  __attribute__((always_inline)) int64_t length_of(int64_t block) const {
    return block + 1 < count ? length : K - block * length;
  }
  // Of a packed row, with scales and sums.
  __attribute__((always_inline)) int64_t row_bytes() const {
    return (stride + 8 * count + 63) / 64 * 64;
  }
};

struct Kernels {
  const char* name;
  int lanes;
  int tile_rows;
  int max_block_rows;    // the most token rows that are worth multiplying together
  int activation_bytes;  // of a packed element: 4 is float32, of which a lone row needs no packing
  bool rounds_to_int8;   // activations, in blocks

  // Packs m rows of K floats into one tile, for weights of a format in groups of group_size (K
  // without).
  void (*pack)(const float* const* rows, int m, int64_t K, WeightFormat format, int64_t group_size,
               void* packed);

  // c[i * num_rows + r] = dot(row i of the tiles, weight row r), r < num_rows. Weights are read
  // once, straight from where they lie. cache_bytes is the size of the second-level cache:
  // activations beyond half of it are taken part by part.
  void (*multiply)(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
                   int64_t cache_bytes, float* c);

  // Applies the activation to a panel of a tile's products, whose rows are c_stride apart, and
  // writes its neurons, from number `first` on, into the packed tile of padded length padded_I.
  // Neurons at or beyond I become zeros; the last panel's call fills the padding. Where activations
  // become int8, a block of which is more than a panel, `tile` is rows of floats, [rows][padded_I],
  // for pack().
  void (*activate)(Activation activation, const float* c, int64_t c_stride, int rows, int64_t first,
                   int64_t I, int64_t padded_I, void* tile);

  // out[0 .. n) = sum over j of weights[j] * y[j][0 .. n), in the order of j. Up to 15 floats after
  // the end of y[j] are read.
  void (*combine)(const float* const* y, const float* weights, int k, int n, float* out);
};

// Those of the instruction set in use (machine.h) for weights and activations of these formats. A
// set takes those of a lesser one where it has none of its own: AMX has none for floats but
// bfloat16, and the VNNI sets have them for integers alone.
const Kernels& kernels(WeightFormat weights, ActivationFormat activations);

extern const Kernels kPortableKernels, kPortableIntegerKernels;
#if defined(ADAPTIVE_K_X86)
extern const Kernels kAvx2Kernels, kAvx2IntegerKernels, kAvxVnniIntegerKernels;
extern const Kernels kAvx512Kernels, kAvx512IntegerKernels, kAvx512VnniIntegerKernels;
extern const Kernels kAmxKernels, kAmxIntegerKernels;
#endif

}  // namespace adaptive_k::cpu
