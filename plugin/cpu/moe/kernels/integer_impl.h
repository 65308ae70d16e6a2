// SPDX-License-Identifier: Apache-2.0
// Products of integer weights with activations rounded to int8 (ActivationFormat::kInt8), over the
// SIMD types `Simd` (impl.h) and `Integers` that the including file defines beforehand.
//
// Integers has: I (a vector of int32 with as many lanes as Simd::V), B (a vector of bytes), kBytes
// (of a B), kOffset<W> (what load() adds to a weight), load(const int8_t*) and load(const
// Int4Pair*) (kBytes weights, in the order of the row), load(p, count) (the first `count`, a
// multiple of 16; what counts nothing follows), load_activations(p, count) likewise, first(int32_t)
// (in the first lane, zeros after it), dot<W>(I, B weights, B activations), which adds to each lane
// the products of its own four or so bytes, and convert(I) to V.
#pragma once

#include "cpu/moe/kernels/impl.h"
#include "cpu/moe/kernels/quantise.h"

namespace adaptive_k::cpu {
namespace {

// Of a tile [rows] of packed activations.
struct IntegerTile {
  const int8_t* values;  // [rows][stride]
  const float* scales;   // [rows][blocks]
  const int32_t* sums;   // [rows][blocks]
};

// M token rows times R weight rows: c = the sums. next_rows are those that are needed next.
template <int M, int R, bool kGrouped, typename W>
void multiply_integers(const IntegerTile& tile, const ActivationBlocks& blocks,
                       const W* const* rows, const float* const* scales, int64_t group_size,
                       const W* const* next_rows, float* c, int64_t c_stride) {
  constexpr int kUnit = Integers::kBytes;
  constexpr int kWhole = kActivationBlock / kUnit;
  constexpr int kLine = std::is_same_v<W, int8_t> ? 64 : 128;  // weights in a cache line
  V acc[M][R];
  ADAPTIVE_K_UNROLL
  for (int m = 0; m < M; ++m) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) acc[m][r] = Simd::zero();
  }
  int64_t group = 0, group_end = group_size;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t begin = b * blocks.length;
    if (kGrouped && begin == group_end) {
      ++group;
      group_end += group_size;
    }
    const int64_t length = blocks.length_of(b);
    const int8_t* x[M];
    V scale[M];
    int32_t offset[M];
    ADAPTIVE_K_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = tile.values + m * blocks.stride + begin;
      scale[m] = Simd::broadcast(tile.scales[m * blocks.count + b]);
      offset[m] = -Integers::kOffset<W> * tile.sums[m * blocks.count + b];
    }
    const auto multiply = [&](auto dots) ADAPTIVE_K_INLINE {
      ADAPTIVE_K_UNROLL
      for (int r = 0; r < R; ++r) {
        for (int64_t k = begin; k < begin + length; k += kLine)
          __builtin_prefetch(at(next_rows[r], k), 0, 3);
        typename Integers::I sums[M];
        ADAPTIVE_K_UNROLL
        for (int m = 0; m < M; ++m) sums[m] = Integers::first(offset[m]);
        dots(at(rows[r], begin), sums);
        ADAPTIVE_K_UNROLL
        for (int m = 0; m < M; ++m) {
          V v = Integers::convert(sums[m]);
          if constexpr (kGrouped) v = Simd::mul(v, Simd::broadcast(scales[r][group]));
          acc[m][r] = Simd::fma(v, scale[m], acc[m][r]);
        }
      }
    };
    if (length == kActivationBlock) {
      multiply([&](const W* w, auto& sums) ADAPTIVE_K_INLINE {
        ADAPTIVE_K_UNROLL
        for (int u = 0; u < kWhole; ++u) {
          const auto weights = Integers::load(at(w, u * kUnit));
          ADAPTIVE_K_UNROLL
          for (int m = 0; m < M; ++m)
            sums[m] = Integers::template dot<W>(sums[m], weights,
                                                Integers::load_activations(x[m] + u * kUnit));
        }
      });
    } else {
      multiply([&](const W* w, auto& sums) ADAPTIVE_K_INLINE {
        for (int64_t u = 0; u < length; u += kUnit) {
          const int count = static_cast<int>(length - u < kUnit ? length - u : kUnit);
          const auto weights = Integers::load(at(w, u), count);
          ADAPTIVE_K_UNROLL
          for (int m = 0; m < M; ++m)
            sums[m] = Integers::template dot<W>(sums[m], weights,
                                                Integers::load_activations(x[m] + u, count));
        }
      });
    }
  }
  ADAPTIVE_K_UNROLL
  for (int m = 0; m < M; ++m) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; r += 4) {
      float sums[4];
      Simd::reduce4(&acc[m][r], sums);
      for (int j = 0; j < 4; ++j)
        c[m * c_stride + r + j] = kGrouped ? sums[j] : sums[j] * scales[r + j][0];
    }
  }
}

// The tokens in a register tile, and how many weight rows 1 to that many leave registers for.
constexpr int kIntegerTileRows = kLanes == 16 ? 4 : 2;
constexpr int integer_group_for(int m) { return kLanes == 16 && m <= 2 ? kWideGroup : kGroup; }

template <bool kGrouped, typename W, int... kRows>
constexpr auto integer_tiles(std::integer_sequence<int, kRows...>) {
  struct {
    decltype(&multiply_integers<1, kGroup, kGrouped, W>) at[sizeof...(kRows)];
  } functions = {{multiply_integers<kRows + 1, integer_group_for(kRows + 1), kGrouped, W>...}};
  return functions;
}
template <bool kGrouped, typename W>
constexpr auto kMultiplyIntegers =
    integer_tiles<kGrouped, W>(std::make_integer_sequence<int, kIntegerTileRows>());

template <typename W>
void multiply_integer_rows(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
                           float* c) {
  const ActivationBlocks blocks(K, weights.group_size);
  const W* const* rows = reinterpret_cast<const W* const*>(weights.rows);
  const bool grouped = weights.group_size < K;
  for (int r = 0; r < weights.num_rows; r += kWideGroup) {
    // The last rows are needed by no one: what is fetched again is there.
    const W* const* next = rows + (r + kWideGroup < weights.num_rows ? r + kWideGroup : r);
    float* to = c + r;
    for (int t = 0; t < num_tiles; ++t) {
      const int m = tiles[t].rows;
      const IntegerTile tile = {
          static_cast<const int8_t*>(tiles[t].x),
          reinterpret_cast<const float*>(static_cast<const char*>(tiles[t].x) + m * blocks.stride),
          reinterpret_cast<const int32_t*>(static_cast<const char*>(tiles[t].x) +
                                           m * (blocks.stride + 4 * blocks.count))};
      const auto multiply =
          grouped ? kMultiplyIntegers<true, W>.at[m - 1] : kMultiplyIntegers<false, W>.at[m - 1];
      for (int g = 0; g < kWideGroup; g += integer_group_for(m))
        multiply(tile, blocks, rows + r + g, weights.scales + r + g, weights.group_size, next + g,
                 to + g, weights.num_rows);
      to += m * weights.num_rows;
    }
  }
}

void multiply_integers(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
                       int64_t /*cache_bytes*/, float* c) {
  if (weights.format == WeightFormat::kInt8)
    multiply_integer_rows<int8_t>(tiles, num_tiles, weights, K, c);
  else
    multiply_integer_rows<Int4Pair>(tiles, num_tiles, weights, K, c);
}

void pack_integers(const float* const* rows, int m, int64_t K, int64_t group_size, void* packed) {
  const ActivationBlocks blocks(K, group_size);
  auto* values = static_cast<int8_t*>(packed);
  auto* scales = reinterpret_cast<float*>(values + m * blocks.stride);
  auto* sums = reinterpret_cast<int32_t*>(scales + m * blocks.count);
  for (int i = 0; i < m; ++i)
    for (int64_t b = 0; b < blocks.count; ++b)
      quantise(rows[i] + b * blocks.length, static_cast<int>(blocks.length_of(b)),
               values + i * blocks.stride + b * blocks.length, &scales[i * blocks.count + b],
               &sums[i * blocks.count + b]);
}

}  // namespace
}  // namespace adaptive_k::cpu
