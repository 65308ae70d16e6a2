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

namespace adaptive_k::cpu {
namespace {

using V = Simd::V;
constexpr int kLanes = Simd::kLanes;
constexpr int kTileRows = Simd::kTileRows;
// Weight rows in a register tile. With one or two token rows there are registers for more.
constexpr int kGroup = 4;
constexpr int kWideGroup = 8;
// The part of K that `many` works on at a time: a tile of activations stays in the first-level
// cache, the panel's weights in the second.
constexpr int kBlockVectors = 512 / kLanes;
// The token rows that share one packing of the weights in `many`.
constexpr int kTilesAtOnce = 96 / kTileRows;
constexpr int kPrefetchBytes = 1024;

template <typename W>
inline V load_tail(const W* w, int count) {
  alignas(64) W padded[kLanes] = {};
  std::memcpy(padded, w, count * sizeof(W));
  return Simd::load(padded);
}

template <int M, int R>
inline void store_sums(const V (&acc)[M][R], float* c) {
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; r += 4) Simd::reduce4(&acc[i][r], c + i * kPanelRows + r);
}

// ---- few tokens -----------------------------------------------------------------------------

template <int M, int R, typename W>
void few_tile(const float* x, const W* const* rows, int64_t K, float* c) {
  V acc[M][R];
  for (int i = 0; i < M; ++i)
    for (int r = 0; r < R; ++r) acc[i][r] = Simd::zero();
  const W* w[R];
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  const int64_t whole = K / kLanes;
  for (int64_t v = 0; v < whole; ++v) {
    V xv[M];
    for (int i = 0; i < M; ++i) xv[i] = Simd::load(x + i * kLanes);
    x += M * kLanes;
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + v * kLanes) + kPrefetchBytes);
      const V wv = Simd::load(w[r] + v * kLanes);
      for (int i = 0; i < M; ++i) acc[i][r] = Simd::fma(xv[i], wv, acc[i][r]);
    }
  }
  if (const int rest = static_cast<int>(K % kLanes)) {
    for (int r = 0; r < R; ++r) {
      const V wv = load_tail(w[r] + whole * kLanes, rest);
      for (int i = 0; i < M; ++i) acc[i][r] = Simd::fma(Simd::load(x + i * kLanes), wv, acc[i][r]);
    }
  }
  store_sums<M, R>(acc, c);
}

template <typename W>
using FewTile = void (*)(const float*, const W* const*, int64_t, float*);

// The widest group of weight rows that M token rows leave registers for.
constexpr int group_for(int m) {
  return m * kWideGroup <= kTileRows * kGroup ? kWideGroup : kGroup;
}

template <typename W>
void few_rows(const Tile* tiles, int num_tiles, const W* const* rows, int num_rows, int64_t K,
              float* c) {
  static_assert(kTileRows == 3 || kTileRows == 6);
  static constexpr FewTile<W> kTiles[] = {
      few_tile<1, group_for(1), W>, few_tile<2, group_for(2), W>,
      few_tile<3, group_for(3), W>,
#if ADAPTIVE_K_TILE_ROWS == 6
      few_tile<4, group_for(4), W>, few_tile<5, group_for(5), W>,
      few_tile<6, group_for(6), W>
#endif
  };
  for (int r = 0; r < num_rows; r += kWideGroup) {
    float* c_tile = c + r;
    for (int t = 0; t < num_tiles; ++t) {
      const int m = tiles[t].rows;
      const int group = group_for(m);
      for (int g = 0; g < kWideGroup; g += group)
        kTiles[m - 1](tiles[t].x, rows + r + g, K, c_tile + g);
      c_tile += m * kPanelRows;
    }
  }
}

void few(const Tile* tiles, int num_tiles, const void* const* rows, int num_rows, int64_t K,
         WeightFormat format, float* c) {
  if (format == WeightFormat::kFloat32)
    few_rows(tiles, num_tiles, reinterpret_cast<const float* const*>(rows), num_rows, K, c);
  else
    few_rows(tiles, num_tiles, reinterpret_cast<const uint16_t* const*>(rows), num_rows, K, c);
}

// ---- many tokens ----------------------------------------------------------------------------

// Continues the accumulators of an M x kGroup tile over `vectors` vectors of K. Between the blocks
// of K they rest in `saved`; after the last their sums go to c.
template <int M>
void many_tile(const float* x, const float* w, int vectors, bool first, bool last, float* saved,
               float* c) {
  V acc[M][kGroup];
  if (first) {
    for (int i = 0; i < M; ++i)
      for (int r = 0; r < kGroup; ++r) acc[i][r] = Simd::zero();
  } else {
    for (int i = 0; i < M; ++i)
      for (int r = 0; r < kGroup; ++r) acc[i][r] = Simd::load(saved + (i * kGroup + r) * kLanes);
  }
  for (int v = 0; v < vectors; ++v) {
    V wv[kGroup];
    for (int r = 0; r < kGroup; ++r) wv[r] = Simd::load(w + r * kLanes);
    for (int i = 0; i < M; ++i) {
      const V xv = Simd::load(x + i * kLanes);
      for (int r = 0; r < kGroup; ++r) acc[i][r] = Simd::fma(xv, wv[r], acc[i][r]);
    }
    x += M * kLanes;
    w += kGroup * kLanes;
  }
  if (last) {
    store_sums<M, kGroup>(acc, c);
  } else {
    for (int i = 0; i < M; ++i)
      for (int r = 0; r < kGroup; ++r) Simd::store(saved + (i * kGroup + r) * kLanes, acc[i][r]);
  }
}

using ManyTile = void (*)(const float*, const float*, int, bool, bool, float*, float*);

struct ManyScratch {
  alignas(64) float weights[kPanelRows * kBlockVectors * kLanes];
  alignas(64) float saved[kTilesAtOnce * (kPanelRows / kGroup) * kTileRows * kGroup * kLanes];
};

// Packs `vectors` vectors of a panel's rows, from element `begin` on, as [row group][vector][row].
template <typename W>
void pack_weights(const W* const* rows, int num_rows, int64_t begin, int vectors, int64_t K,
                  float* packed) {
  const int whole = static_cast<int>((K - begin) / kLanes);
  const int full = whole < vectors ? whole : vectors;
  for (int g = 0; g < num_rows; g += kGroup) {
    float* to = packed + static_cast<int64_t>(g) * vectors * kLanes;
    for (int r = 0; r < kGroup; ++r) {
      const W* from = rows[g + r] + begin;
      for (int v = 0; v < full; ++v)
        Simd::store(to + (v * kGroup + r) * kLanes, Simd::load(from + v * kLanes));
      if (full < vectors)
        Simd::store(to + (full * kGroup + r) * kLanes,
                    load_tail(from + full * kLanes, static_cast<int>(K % kLanes)));
    }
  }
}

template <typename W>
void many_rows(const Tile* tiles, int num_tiles, const W* const* rows, int num_rows, int64_t K,
               float* c) {
  static constexpr ManyTile kTiles[] = {many_tile<1>, many_tile<2>,
                                        many_tile<3>,
#if ADAPTIVE_K_TILE_ROWS == 6
                                        many_tile<4>, many_tile<5>,
                                        many_tile<6>
#endif
  };
  // On the heap, not in static thread-local storage: a library opened late may get little of that.
  static thread_local ManyScratch* scratch = nullptr;
  if (scratch == nullptr)
    scratch =
        static_cast<ManyScratch*>(std::aligned_alloc(64, (sizeof(ManyScratch) + 63) / 64 * 64));
  const int64_t total = (K + kLanes - 1) / kLanes;
  while (num_tiles > 0) {
    const int at_once = num_tiles < kTilesAtOnce ? num_tiles : kTilesAtOnce;
    int64_t begin = 0;
    do {
      const int vectors =
          static_cast<int>(total - begin < kBlockVectors ? total - begin : kBlockVectors);
      const bool first = begin == 0, last = begin + vectors == total;
      pack_weights(rows, num_rows, begin * kLanes, vectors, K, scratch->weights);
      float* saved = scratch->saved;
      float* c_tile = c;
      for (int t = 0; t < at_once; ++t) {
        const int m = tiles[t].rows;
        for (int g = 0; g < num_rows; g += kGroup) {
          kTiles[m - 1](tiles[t].x + begin * m * kLanes,
                        scratch->weights + static_cast<int64_t>(g) * vectors * kLanes, vectors,
                        first, last, saved, c_tile + g);
          saved += kTileRows * kGroup * kLanes;
        }
        c_tile += m * kPanelRows;
      }
      begin += vectors;
    } while (begin < total);
    for (int t = 0; t < at_once; ++t) c += tiles[t].rows * kPanelRows;
    tiles += at_once;
    num_tiles -= at_once;
  }
}

void many(const Tile* tiles, int num_tiles, const void* const* rows, int num_rows, int64_t K,
          WeightFormat format, float* c) {
  if (format == WeightFormat::kFloat32)
    many_rows(tiles, num_tiles, reinterpret_cast<const float* const*>(rows), num_rows, K, c);
  else
    many_rows(tiles, num_tiles, reinterpret_cast<const uint16_t* const*>(rows), num_rows, K, c);
}

// ---- around the products --------------------------------------------------------------------

void pack(const float* const* rows, int m, int64_t K, float* packed) {
  const int64_t whole = K / kLanes;
  for (int i = 0; i < m; ++i) {
    float* to = packed + i * kLanes;
    for (int64_t v = 0; v < whole; ++v, to += m * kLanes)
      Simd::store(to, Simd::load(rows[i] + v * kLanes));
    if (K % kLanes)
      Simd::store(to, load_tail(rows[i] + whole * kLanes, static_cast<int>(K % kLanes)));
  }
}

template <Activation kind>
void activate_rows(const float* c, int rows, int64_t first, int count, int64_t I, int64_t padded_I,
                   float* tile) {
  for (int i = 0; i < rows; ++i) {
    alignas(64) float h[kPanelRows];
    const float* panel = c + i * kPanelRows;
    // A constant trip count, so that every neuron takes the same vector code.
    constexpr int kNeurons = is_gated(kind) ? kPanelRows / 2 : kPanelRows;
    for (int j = 0; j < kNeurons; ++j)
      h[j] = is_gated(kind) ? adaptive_k::activate<kind>(panel[j], panel[j + kNeurons])
                            : adaptive_k::activate<kind>(0.0f, panel[j]);
    for (int64_t n = I - first; n < count; ++n)
      if (n >= 0) h[n] = 0.0f;
    const int64_t end = first + count < padded_I ? first + count : padded_I;
    for (int64_t n = first; n < end; n += kLanes)
      std::memcpy(tile + (n * rows + i * kLanes), h + (n - first), kLanes * sizeof(float));
  }
}

void activate(Activation activation, const float* c, int rows, int64_t first, int count, int64_t I,
              int64_t padded_I, float* tile) {
  switch (activation) {
#define ADAPTIVE_K_CASE(kind) \
  case Activation::kind:      \
    return activate_rows<Activation::kind>(c, rows, first, count, I, padded_I, tile)
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
  alignas(64) float sum[kPanelRows] = {};
  for (int j = 0; j < k; ++j) {
    const V weight = Simd::broadcast(weights[j]);
    for (int h = 0; h < kPanelRows; h += kLanes)
      Simd::store(sum + h, Simd::fma(weight, Simd::load(y[j] + h), Simd::load(sum + h)));
  }
  std::memcpy(out, sum, n * sizeof(float));
}

}  // namespace
}  // namespace adaptive_k::cpu
