// SPDX-License-Identifier: Apache-2.0
// Products of integer weights with activations rounded to int8 (ActivationFormat::kInt8), over the
// SIMD types `Simd` (impl.h) and `Integers` that the including file defines beforehand.
//
// Integers has: I (a vector of int32), B (a vector of bytes), kBytes (of a B), kOffset<W> (what
// load() adds to a weight), load_two(p, B[2]) (2 kBytes weights: int8 in the order of the row, int4
// the even ones and then the odd ones), load(p, count) (the first `count` of kBytes in the order of
// the row, a multiple of 16; what follows counts nothing), load_activations(p, count) likewise and
// load_activations(p), zero(), dot<W>(I, B weights, B activations), which adds the products to some
// lanes, reduce(I[4]), which sums the lanes of each, and Four, four floats made of() those sums.
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

// M token rows times R weight rows, a multiple of 4: c = the sums. next_rows are those that are
// needed next.
template <int M, int R, bool kGrouped, typename W>
void multiply_integers(const IntegerTile& tile, const ActivationBlocks& blocks,
                       const W* const* rows, const float* const* scales, int64_t group_size,
                       const W* const* next_rows, float* c, int64_t c_stride) {
  constexpr int kUnit = Integers::kBytes;
  constexpr int kLine = std::is_same_v<W, int8_t> ? 64 : 128;  // weights in a cache line
  using Four = typename Integers::Four;
  Four acc[M][R / 4];
  ADAPTIVE_K_UNROLL
  for (int m = 0; m < M; ++m) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R / 4; ++r) acc[m][r] = Four::zero();
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
    ADAPTIVE_K_UNROLL
    for (int m = 0; m < M; ++m) x[m] = tile.values + m * blocks.stride + begin;
    const auto multiply = [&](auto dots) ADAPTIVE_K_INLINE {
      ADAPTIVE_K_UNROLL
      for (int r = 0; r < R; r += 4) {
        typename Integers::I sums[M][4];
        ADAPTIVE_K_UNROLL
        for (int j = 0; j < 4; ++j) {
          for (int64_t k = begin; k < begin + length; k += kLine)
            __builtin_prefetch(at(next_rows[r + j], k), 0, 3);
          ADAPTIVE_K_UNROLL
          for (int m = 0; m < M; ++m) sums[m][j] = Integers::zero();
          dots(at(rows[r + j], begin), [&](int m, const auto& w, const auto& v) ADAPTIVE_K_INLINE {
            sums[m][j] = Integers::template dot<W>(sums[m][j], w, v);
          });
        }
        ADAPTIVE_K_UNROLL
        for (int m = 0; m < M; ++m) {
          const int64_t at_block = m * blocks.count + b;
          Four v = Four::of(Integers::reduce(sums[m]),
                            -Integers::template kOffset<W> * tile.sums[at_block]);
          if constexpr (kGrouped)
            v = v.times(scales[r][group], scales[r + 1][group], scales[r + 2][group],
                        scales[r + 3][group]);
          acc[m][r / 4] = v.times_plus(tile.scales[at_block], acc[m][r / 4]);
        }
      }
    };
    multiply([&](const W* w, const auto& dot) ADAPTIVE_K_INLINE {
      int64_t k = 0;
      for (; k + kActivationBlock <= length; k += kActivationBlock) {
        ADAPTIVE_K_UNROLL
        for (int u = 0; u < kActivationBlock; u += 2 * kUnit) {
          // Of int4 the even ones, then the odd ones: two nibbles are told apart in one place.
          typename Integers::B weights[2];
          Integers::load_two(at(w, k + u), weights);
          ADAPTIVE_K_UNROLL
          for (int m = 0; m < M; ++m) {
            dot(m, weights[0], Integers::load_activations(x[m] + k + u));
            dot(m, weights[1], Integers::load_activations(x[m] + k + u + kUnit));
          }
        }
      }
      for (; k < length; k += kUnit) {
        const int count = static_cast<int>(length - k < kUnit ? length - k : kUnit);
        const auto weights = Integers::load(at(w, k), count);
        ADAPTIVE_K_UNROLL
        for (int m = 0; m < M; ++m) dot(m, weights, Integers::load_activations(x[m] + k, count));
      }
    });
  }
  ADAPTIVE_K_UNROLL
  for (int m = 0; m < M; ++m) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; r += 4) {
      Four v = acc[m][r / 4];
      if constexpr (!kGrouped)
        v = v.times(scales[r][0], scales[r + 1][0], scales[r + 2][0], scales[r + 3][0]);
      v.store(c + m * c_stride + r);
    }
  }
}

// The tokens in a register tile, and how many weight rows 1 to that many leave registers for.
constexpr int kIntegerTileRows = kLanes == 16 ? 4 : 2;
constexpr int integer_group_for(int m) { return m == 1 ? kWideGroup : kGroup; }

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
  // After the last rows come those of the next product; if there is none, what is fetched again is
  // there.
  const W* after[kWideGroup];
  for (int i = 0; i < kWideGroup; ++i) {
    const auto* begin = static_cast<const W*>(weights.next[0]);
    after[i] = begin == nullptr ? rows[weights.num_rows - kWideGroup + i] : at(begin, i * K);
  }
  for (int r = 0; r < weights.num_rows; r += kWideGroup) {
    const W* const* next = r + kWideGroup < weights.num_rows ? rows + r + kWideGroup : after;
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

// Writes rows of floats, [rows][padded_I], for pack_integers(): a block is more than a panel.
void activate_integers(Activation activation, const float* c, int64_t c_stride, int rows,
                       int64_t first, int64_t I, int64_t padded_I, void* tile) {
  alignas(64) float h[kPanelRows * kMaxTileRows];  // [neurons / kLanes][rows][kLanes]
  const int neurons = is_gated(activation) ? kPanelRows / 2 : kPanelRows;
  activate(activation, c, c_stride, rows, 0, I - first, neurons, h);
  for (int i = 0; i < rows; ++i) {
    float* to = static_cast<float*>(tile) + i * padded_I + first;
    for (int64_t n = 0; n < neurons && first + n < I; n += kLanes)
      std::memcpy(to + n, h + n * rows + i * kLanes,
                  (I - first - n < kLanes ? I - first - n : kLanes) * sizeof(float));
  }
}

// Brings a block of activations into the order in which multiply_integers() meets int4.
void tell_apart(int8_t* values, int length) {
  int8_t even_odd[2 * Integers::kBytes];
  for (int k = 0; k + kActivationBlock <= length; k += kActivationBlock) {
    for (int u = k; u < k + kActivationBlock; u += 2 * Integers::kBytes) {
      for (int i = 0; i < Integers::kBytes; ++i) {
        even_odd[i] = values[u + 2 * i];
        even_odd[Integers::kBytes + i] = values[u + 2 * i + 1];
      }
      std::memcpy(values + u, even_odd, sizeof even_odd);
    }
  }
}

void pack_integers(const float* const* rows, int m, int64_t K, WeightFormat format,
                   int64_t group_size, void* packed) {
  const ActivationBlocks blocks(K, group_size);
  auto* values = static_cast<int8_t*>(packed);
  auto* scales = reinterpret_cast<float*>(values + m * blocks.stride);
  auto* sums = reinterpret_cast<int32_t*>(scales + m * blocks.count);
  for (int i = 0; i < m; ++i) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      int8_t* to = values + i * blocks.stride + b * blocks.length;
      const int length = static_cast<int>(blocks.length_of(b));
      quantise(rows[i] + b * blocks.length, length, to, &scales[i * blocks.count + b],
               &sums[i * blocks.count + b]);
      if (format == WeightFormat::kInt4) tell_apart(to, length);
    }
  }
}

constexpr Kernels integer_kernels(const char* name) {
  return {name,
          1,
          kIntegerTileRows,
          kMaxBlockRows,
          1,
          true,
          pack_integers,
          multiply_integers,
          activate_integers,
          combine};
}

}  // namespace
}  // namespace adaptive_k::cpu
