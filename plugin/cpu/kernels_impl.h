// SPDX-License-Identifier: Apache-2.0
// The bodies of the kernels, over a SIMD type `Simd` that the including file defines beforehand.
// Everything is in an unnamed namespace: the including files are compiled for different
// instruction sets, and no function of one may stand in for another's at link time.
//
// Simd has: V (the vector type), kLanes, kTileRows (token rows in a register tile), zero(),
// load(const float*), load(const uint16_t*) (bfloat16), store(float*, V), fma(a, b, c) = a * b + c,
// and reduce4(const V[4], float[4]), which sums the lanes of four vectors by the same tree.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "adaptive_k/activation.h"
#include "kernels.h"

// The accumulators of a tile are an array only in name: with the loops over it unrolled from the
// start, the compiler keeps them in registers and copies none through the stack.
#define ADAPTIVE_K_UNROLL _Pragma("GCC unroll 8")

namespace adaptive_k::cpu {
namespace {

using V = Simd::V;
constexpr int kLanes = Simd::kLanes;
constexpr int kTileRows = Simd::kTileRows;
constexpr int kMaxBlockRows = 96;
// Weight rows in a register tile. With one or two token rows there are registers for more.
constexpr int kGroup = 4;
constexpr int kWideGroup = 8;

// The widest group of weight rows that m token rows leave registers for.
constexpr int group_for(int m) {
  return m * kWideGroup <= kTileRows * kGroup ? kWideGroup : kGroup;
}

template <typename W>
inline V load_tail(const W* w, int count) {
  alignas(64) W padded[kLanes] = {};
  std::memcpy(padded, w, count * sizeof(W));
  return Simd::load(padded);
}

// M token rows times R weight rows, over `length` elements: c = or c += the sums. The elements of a
// row are kStep vectors apart (1 where weights are read in place). Meanwhile a piece of the weights
// needed next, 4 length >> next_shift bytes, comes into the second-level cache.
template <int M, int R, int kStep, typename W>
void multiply_tile(const float* x, const W* const* rows, int length, const char* next,
                   int next_shift, bool add, float* c, int64_t c_stride) {
  V acc[M][R];
  ADAPTIVE_K_UNROLL
  for (int i = 0; i < M; ++i) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) acc[i][r] = Simd::zero();
  }
  const W* w[R];
  ADAPTIVE_K_UNROLL
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  int k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    __builtin_prefetch(next + (4 * k >> next_shift), 0, 2);
    V xv[M];
    ADAPTIVE_K_UNROLL
    for (int i = 0; i < M; ++i) xv[i] = Simd::load(x + i * kLanes);
    x += M * kLanes;
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) {
      const V wv = Simd::load(w[r] + k * kStep);
      ADAPTIVE_K_UNROLL
      for (int i = 0; i < M; ++i) acc[i][r] = Simd::fma(xv[i], wv, acc[i][r]);
    }
  }
  if (k < length) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) {
      const V wv = load_tail(w[r] + k, length - k);
      ADAPTIVE_K_UNROLL
      for (int i = 0; i < M; ++i) acc[i][r] = Simd::fma(Simd::load(x + i * kLanes), wv, acc[i][r]);
    }
  }
  ADAPTIVE_K_UNROLL
  for (int i = 0; i < M; ++i) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; r += 4) {
      float sums[4];
      Simd::reduce4(&acc[i][r], sums);
      float* to = c + i * c_stride + r;
      for (int j = 0; j < 4; ++j) to[j] = add ? to[j] + sums[j] : sums[j];
    }
  }
}

template <typename W>
using MultiplyTile = void (*)(const float*, const W* const*, int, const char*, int, bool, float*,
                              int64_t);

template <typename W>
constexpr MultiplyTile<W> kMultiplyInPlace[] = {
    multiply_tile<1, group_for(1), 1, W>, multiply_tile<2, group_for(2), 1, W>,
    multiply_tile<3, group_for(3), 1, W>,
#if ADAPTIVE_K_TILE_ROWS == 6
    multiply_tile<4, group_for(4), 1, W>, multiply_tile<5, group_for(5), 1, W>,
    multiply_tile<6, group_for(6), 1, W>,
#endif
};
constexpr MultiplyTile<float> kMultiplyPacked[] = {
    multiply_tile<1, kGroup, kGroup, float>, multiply_tile<2, kGroup, kGroup, float>,
    multiply_tile<3, kGroup, kGroup, float>,
#if ADAPTIVE_K_TILE_ROWS == 6
    multiply_tile<4, kGroup, kGroup, float>, multiply_tile<5, kGroup, kGroup, float>,
    multiply_tile<6, kGroup, kGroup, float>,
#endif
};
// From this many tiles on, a group's weights are first packed: aligned, converted once, and without
// the cache conflicts of rows that lie a power of two apart.
constexpr int kTilesToPack = 4;

// Packs kGroup rows as [vector][row][lane], with zeros to the end of the last vector.
template <typename W>
void pack_weights(const W* const* rows, int length, float* packed) {
  int k = 0;
  for (; k + kLanes <= length; k += kLanes)
    for (int r = 0; r < kGroup; ++r)
      Simd::store(packed + k * kGroup + r * kLanes, Simd::load(rows[r] + k));
  if (k < length)
    for (int r = 0; r < kGroup; ++r)
      Simd::store(packed + k * kGroup + r * kLanes, load_tail(rows[r] + k, length - k));
}

float* packed_group() {
  // On the heap, not in static thread-local storage: a library opened late may get little of that.
  // Lives as long as the thread pool.
  static thread_local float* packed = nullptr;
  if (packed == nullptr)
    packed = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * kWideGroup * kPart));
  return packed;
}

// One part of K of all tiles, for one group of weight rows. next_rows[i] + next_offset is where the
// following call of this function begins to read.
template <typename W>
void multiply_group(const Tile* tiles, int num_tiles, const W* const* rows, int64_t offset,
                    int length, const W* const* next_rows, int64_t next_offset, float* c,
                    int64_t c_stride) {
  const bool pack = num_tiles >= kTilesToPack;
  const W* in_place[kWideGroup];
  const float* packed[kWideGroup];
  for (int r = 0; r < kWideGroup; ++r) in_place[r] = rows[r] + offset;
  if (pack) {
    for (int g = 0; g < kWideGroup; g += kGroup) {
      float* to = packed_group() + g * kPart;
      pack_weights(in_place + g, length, to);
      for (int r = 0; r < kGroup; ++r) packed[g + r] = to + r * kLanes;
    }
  }
  const int padded_length = (length + kLanes - 1) / kLanes * kLanes;

  // The rows that come next are fetched meanwhile, a little with each call: all at once, they would
  // crowd out the loads of this group.
  const auto group_of = [pack](int m) { return pack ? kGroup : group_for(m); };
  int calls = 0;
  for (int t = 0; t < num_tiles; ++t) calls += kWideGroup / group_of(tiles[t].rows);
  int shift = 0;
  while ((kWideGroup << (shift + 1)) <= calls) ++shift;
  constexpr int kFormatShift = sizeof(W) == sizeof(float) ? 0 : 1;
  int call = 0;
  for (int t = 0; t < num_tiles; ++t) {
    const int m = tiles[t].rows;
    const float* x = static_cast<const float*>(tiles[t].x) + offset * m;
    const int group = group_of(m);
    for (int g = 0; g < kWideGroup; g += group, ++call) {
      const int row = (call >> shift) % kWideGroup;
      const int piece = call & ((1 << shift) - 1);
      const char* next =
          reinterpret_cast<const char*>(next_rows[row] + next_offset + piece * (length >> shift));
      if (pack)
        kMultiplyPacked[m - 1](x, packed + g, padded_length, next, shift + kFormatShift, offset > 0,
                               c + g, c_stride);
      else
        kMultiplyInPlace<W>[m - 1](x, in_place + g, length, next, shift + kFormatShift, offset > 0,
                                   c + g, c_stride);
    }
    c += m * c_stride;
  }
}

template <typename W>
void multiply_rows(const Tile* tiles, int num_tiles, const W* const* rows, int num_rows, int64_t K,
                   int64_t cache_bytes, float* c) {
  int64_t token_rows = 0;
  for (int t = 0; t < num_tiles; ++t) token_rows += tiles[t].rows;
  const auto length_at = [K](int64_t offset) {
    return static_cast<int>(K - offset < kPart ? K - offset : kPart);
  };
  if (token_rows * K * static_cast<int64_t>(sizeof(float)) <= cache_bytes / 2) {
    // All activations stay in the second-level cache: read each weight row from end to end.
    for (int r = 0; r < num_rows; r += kWideGroup) {
      for (int64_t offset = 0; offset < K; offset += kPart) {
        const bool same = offset + kPart < K;
        const int next = same || r + kWideGroup == num_rows ? r : r + kWideGroup;
        multiply_group(tiles, num_tiles, rows + r, offset, length_at(offset), rows + next,
                       same ? offset + kPart : 0, c + r, num_rows);
      }
    }
  } else {
    // One part of the activations stays there, while that part of all weight rows passes by.
    for (int64_t offset = 0; offset < K; offset += kPart) {
      for (int r = 0; r < num_rows; r += kWideGroup) {
        const bool same = r + kWideGroup < num_rows;
        multiply_group(tiles, num_tiles, rows + r, offset, length_at(offset),
                       rows + (same ? r + kWideGroup : 0),
                       same || offset + kPart >= K ? offset : offset + kPart, c + r, num_rows);
      }
    }
  }
}

void multiply(const Tile* tiles, int num_tiles, const void* const* weight_rows, int num_rows,
              int64_t K, WeightFormat format, int64_t cache_bytes, float* c) {
  if (format == WeightFormat::kFloat32)
    multiply_rows(tiles, num_tiles, reinterpret_cast<const float* const*>(weight_rows), num_rows, K,
                  cache_bytes, c);
  else
    multiply_rows(tiles, num_tiles, reinterpret_cast<const uint16_t* const*>(weight_rows), num_rows,
                  K, cache_bytes, c);
}

// ---- around the products --------------------------------------------------------------------

void pack(const float* const* rows, int m, int64_t K, void* packed) {
  const int64_t whole = K / kLanes;
  for (int i = 0; i < m; ++i) {
    float* to = static_cast<float*>(packed) + i * kLanes;
    for (int64_t v = 0; v < whole; ++v, to += m * kLanes)
      Simd::store(to, Simd::load(rows[i] + v * kLanes));
    if (K % kLanes)
      Simd::store(to, load_tail(rows[i] + whole * kLanes, static_cast<int>(K % kLanes)));
  }
}

template <Activation kind>
void activate_rows(const float* c, int64_t c_stride, int rows, int64_t first, int64_t I,
                   int64_t padded_I, float* tile) {
  constexpr int kNeurons = is_gated(kind) ? kPanelRows / 2 : kPanelRows;
  for (int i = 0; i < rows; ++i) {
    alignas(64) float h[kPanelRows];
    const float* panel = c + i * c_stride;
    // A constant trip count, so that every neuron takes the same vector code.
    for (int j = 0; j < kNeurons; ++j)
      h[j] = is_gated(kind) ? adaptive_k::activate<kind>(panel[j], panel[j + kNeurons])
                            : adaptive_k::activate<kind>(0.0f, panel[j]);
    for (int64_t j = I - first; j < kNeurons; ++j) h[j] = 0.0f;
    const int64_t end = first + kNeurons < padded_I ? first + kNeurons : padded_I;
    for (int64_t n = first; n < end; n += kLanes)
      std::memcpy(tile + (n * rows + i * kLanes), h + (n - first), kLanes * sizeof(float));
  }
}

void activate(Activation activation, const float* c, int64_t c_stride, int rows, int64_t first,
              int64_t I, int64_t padded_I, void* tile) {
  switch (activation) {
#define ADAPTIVE_K_CASE(kind)                                                     \
  case Activation::kind:                                                          \
    return activate_rows<Activation::kind>(c, c_stride, rows, first, I, padded_I, \
                                           static_cast<float*>(tile))
    ADAPTIVE_K_CASE(kSwiglu);
    ADAPTIVE_K_CASE(kGeglu);
    ADAPTIVE_K_CASE(kSilu);
    ADAPTIVE_K_CASE(kGelu);
    ADAPTIVE_K_CASE(kGeluTanh);
    ADAPTIVE_K_CASE(kRelu);
    ADAPTIVE_K_CASE(kRelu2);
#undef ADAPTIVE_K_CASE
  }
}

void combine(const float* const* y, const float* weights, int k, int n, float* out) {
  for (int h = 0; h < n; h += kLanes) {
    V sum = Simd::zero();
    for (int j = 0; j < k; ++j)
      sum = Simd::fma(Simd::broadcast(weights[j]), Simd::load(y[j] + h), sum);
    if (h + kLanes <= n) {
      Simd::store(out + h, sum);
    } else {
      alignas(64) float rest[kLanes];
      Simd::store(rest, sum);
      std::memcpy(out + h, rest, (n - h) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace adaptive_k::cpu
