// SPDX-License-Identifier: Apache-2.0
// The bodies of the kernels, over a SIMD type `Simd` that the including file defines beforehand.
// Everything is in an unnamed namespace: the including files are compiled for different
// instruction sets, and no function of one may stand in for another's at link time.
//
// Simd has: V (the vector type), kLanes, kTileRows (token rows in a register tile), zero(),
// load(const float*), load(const uint16_t*) (bfloat16), load(const int8_t*), load(const Int4Pair*),
// store(float*, V), mul(a, b), fma(a, b, c) = a * b + c, and reduce4(const V[4], float[4]), which
// sums the lanes of four vectors by the same tree. In the place of load(const Int4Pair*) it may
// have ScaledInt4, whose load(const Int4Pair*) gives kLanes values times the scale that
// set_scale(float) gave it, in an order of lanes into which arrange(V) brings others and from which
// restore(V) brings them back.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/moe/kernels/kernels.h"
#include "operator/activation.h"

// The accumulators of a tile are an array only in name: with the loops over it unrolled from the
// start, the compiler keeps them in registers and copies none through the stack.
#define ADAPTIVE_K_UNROLL _Pragma("GCC unroll 8")
#define ADAPTIVE_K_INLINE __attribute__((always_inline))

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

struct InOrder {
  static V arrange(V x) { return x; }
  static V restore(V x) { return x; }
};

// Reads kLanes weights as floats, in the order of lanes that arrange() makes and restore() undoes.
template <typename W>
struct Reader : InOrder {
  static constexpr bool kQuantised = false;
  V load(const W* w) const { return Simd::load(w); }
};

template <typename W>
struct ScaledReader : InOrder {
  static constexpr bool kQuantised = true;
  V scale;
  void set_scale(float s) { scale = Simd::broadcast(s); }
  V load(const W* w) const { return Simd::mul(Simd::load(w), scale); }
};

// The set's own way with int4, if it has one.
template <typename Set, typename = void>
struct Int4Reader : ScaledReader<Int4Pair> {};
template <typename Set>
struct Int4Reader<Set, std::void_t<typename Set::ScaledInt4>> : Set::ScaledInt4 {
  static constexpr bool kQuantised = true;
};

template <>
struct Reader<int8_t> : ScaledReader<int8_t> {};
template <>
struct Reader<Int4Pair> : Int4Reader<Simd> {};

// What element k of a row lies at, where k is even.
template <typename W>
inline const W* at(const W* row, int64_t k) {
  return row + k;
}
inline const Int4Pair* at(const Int4Pair* row, int64_t k) { return row + k / 2; }

// log2 of how many weights take the room of a float.
template <typename W>
constexpr int kWeightsPerFloatShift = sizeof(W) == 4   ? 0
                                      : sizeof(W) == 2 ? 1
                                                       : 2;
template <>
constexpr int kWeightsPerFloatShift<Int4Pair> = 3;

// The scales of some quantised rows, of which a part is read that begins at element `offset`.
struct Scales {
  const float* const* rows;
  int64_t group_size;
  int64_t offset;

  Scales from_row(int row) const {
    return {rows == nullptr ? nullptr : rows + row, group_size, offset};
  }
};

// Calls body(group, end) for each group of a part of `length` elements, which in the part ends
// before `end`. Rows that are not quantised are one group.
template <typename W, typename Body>
inline void for_each_group(const Scales& scales, int length, const Body& body) {
  if constexpr (Reader<W>::kQuantised) {
    int64_t group = scales.offset / scales.group_size;
    int64_t end = (group + 1) * scales.group_size - scales.offset;
    for (; end < length; end += scales.group_size) body(group++, static_cast<int>(end));
    body(group, length);
  } else {
    body(0, length);
  }
}

template <typename W>
inline V load_tail(const W* w, int count) {
  alignas(64) W padded[kLanes] = {};
  std::memcpy(padded, w, count * sizeof(W));
  return Simd::load(padded);
}

// A piece of a weight row that is needed next, 4 length >> shift bytes for `length` elements.
struct NextPiece {
  const char* begin;
  int shift;

  void fetch(int k) const { __builtin_prefetch(begin + (4 * k >> shift), 0, 2); }
};

// All the kWideGroup rows that are needed next. A part of a row of integers is over before the
// processor's own prefetching has found it, so the lines of every row are fetched here.
template <typename W>
struct NextRows {
  const W* const* rows;
  int64_t offset;

  void fetch(int k) const {
    constexpr int kSteps = (16 << kWeightsPerFloatShift<W>) / kLanes;  // that a line lasts
    constexpr int kRows = kSteps < kWideGroup ? kWideGroup / kSteps : 1;
    const unsigned step = static_cast<unsigned>(k) / kLanes;
    const unsigned row = step * kWideGroup / kSteps % kWideGroup;
    for (int j = 0; j < kRows; ++j) __builtin_prefetch(at(rows[row + j], offset + k), 0, 3);
  }
};

// M token rows times R weight rows, over `length` elements: c = or c += the sums. The elements of a
// row are kStep vectors apart (1 where weights are read in place). Meanwhile `next` comes into a
// cache.
template <int M, int R, int kStep, typename W, typename Next>
void multiply_tile(const float* x, const W* const* rows, const Scales& scales, int length,
                   const Next& next, bool add, float* c, int64_t c_stride) {
  V acc[M][R];
  ADAPTIVE_K_UNROLL
  for (int i = 0; i < M; ++i) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) acc[i][r] = Simd::zero();
  }
  const W* w[R];
  ADAPTIVE_K_UNROLL
  for (int r = 0; r < R; ++r) w[r] = rows[r];
  Reader<W> read[R];
  int k = 0;
  for_each_group<W>(scales, length, [&](int64_t group, int end) ADAPTIVE_K_INLINE {
    if constexpr (Reader<W>::kQuantised) {
      ADAPTIVE_K_UNROLL
      for (int r = 0; r < R; ++r) read[r].set_scale(scales.rows[r][group]);
    }
    for (; k + kLanes <= end; k += kLanes) {
      next.fetch(k);
      V xv[M];
      ADAPTIVE_K_UNROLL
      for (int i = 0; i < M; ++i) xv[i] = Reader<W>::arrange(Simd::load(x + i * kLanes));
      x += M * kLanes;
      ADAPTIVE_K_UNROLL
      for (int r = 0; r < R; ++r) {
        const V wv = read[r].load(at(w[r], k * kStep));
        ADAPTIVE_K_UNROLL
        for (int i = 0; i < M; ++i) acc[i][r] = Simd::fma(xv[i], wv, acc[i][r]);
      }
    }
  });
  if constexpr (!Reader<W>::kQuantised) {
    if (k < length) {
      ADAPTIVE_K_UNROLL
      for (int r = 0; r < R; ++r) {
        const V wv = load_tail(w[r] + k, length - k);
        ADAPTIVE_K_UNROLL
        for (int i = 0; i < M; ++i)
          acc[i][r] = Simd::fma(Simd::load(x + i * kLanes), wv, acc[i][r]);
      }
    }
  }
  ADAPTIVE_K_UNROLL
  for (int i = 0; i < M; ++i) {
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; ++r) acc[i][r] = Reader<W>::restore(acc[i][r]);
    ADAPTIVE_K_UNROLL
    for (int r = 0; r < R; r += 4) {
      float sums[4];
      Simd::reduce4(&acc[i][r], sums);
      float* to = c + i * c_stride + r;
      for (int j = 0; j < 4; ++j) to[j] = add ? to[j] + sums[j] : sums[j];
    }
  }
}

template <typename W, typename Next>
using MultiplyTile = void (*)(const float*, const W* const*, const Scales&, int, const Next&, bool,
                              float*, int64_t);

template <typename W>
using NextInPlace = std::conditional_t<Reader<W>::kQuantised, NextRows<W>, NextPiece>;
// multiply_tile for 1 to kTileRows token rows.
template <typename Function>
struct ByRows {
  Function at[kTileRows];
};
template <typename W, int... kRows>
constexpr ByRows<MultiplyTile<W, NextInPlace<W>>> in_place(std::integer_sequence<int, kRows...>) {
  return {{multiply_tile<kRows + 1, group_for(kRows + 1), 1, W>...}};
}
template <int... kRows>
constexpr ByRows<MultiplyTile<float, NextPiece>> packed(std::integer_sequence<int, kRows...>) {
  return {{multiply_tile<kRows + 1, kGroup, kGroup, float>...}};
}
template <typename W>
constexpr auto kMultiplyInPlace = in_place<W>(std::make_integer_sequence<int, kTileRows>());
constexpr auto kMultiplyPacked = packed(std::make_integer_sequence<int, kTileRows>());

// From this many tiles on, a group's weights are first packed: aligned, converted once, and without
// the cache conflicts of rows that lie a power of two apart.
constexpr int kTilesToPack = 4;

// Packs kGroup rows as [vector][row][lane], with zeros to the end of the last vector.
template <typename W>
void pack_weights(const W* const* rows, const Scales& scales, int length, float* packed) {
  Reader<W> read[kGroup];
  int k = 0;
  for_each_group<W>(scales, length, [&](int64_t group, int end) {
    if constexpr (Reader<W>::kQuantised)
      for (int r = 0; r < kGroup; ++r) read[r].set_scale(scales.rows[r][group]);
    for (; k + kLanes <= end; k += kLanes)
      for (int r = 0; r < kGroup; ++r)
        Simd::store(packed + k * kGroup + r * kLanes,
                    Reader<W>::restore(read[r].load(at(rows[r], k))));
  });
  if constexpr (!Reader<W>::kQuantised)
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

// One part of K, from scales.offset on, of all tiles, for one group of weight rows.
// next_rows[i] + next_offset is where the following call of this function begins to read.
template <typename W>
void multiply_group(const Tile* tiles, int num_tiles, const W* const* rows, const Scales& scales,
                    int length, const W* const* next_rows, int64_t next_offset, float* c,
                    int64_t c_stride) {
  const int64_t offset = scales.offset;
  const bool pack = num_tiles >= kTilesToPack;
  const W* in_place[kWideGroup];
  const float* packed[kWideGroup];
  for (int r = 0; r < kWideGroup; ++r) in_place[r] = at(rows[r], offset);
  if (pack) {
    for (int g = 0; g < kWideGroup; g += kGroup) {
      float* to = packed_group() + g * kPart;
      pack_weights(in_place + g, scales.from_row(g), length, to);
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
  int call = 0;
  for (int t = 0; t < num_tiles; ++t) {
    const int m = tiles[t].rows;
    const float* x = static_cast<const float*>(tiles[t].x) + offset * m;
    const int group = group_of(m);
    for (int g = 0; g < kWideGroup; g += group, ++call) {
      const int row = (call >> shift) % kWideGroup;
      const int number = call & ((1 << shift) - 1);
      const NextPiece piece = {reinterpret_cast<const char*>(
                                   at(next_rows[row], next_offset + number * (length >> shift))),
                               shift + kWeightsPerFloatShift<W>};
      if (pack) {
        kMultiplyPacked.at[m - 1](x, packed + g, {}, padded_length, piece, offset > 0, c + g,
                                  c_stride);
        continue;
      }
      NextInPlace<W> next;
      if constexpr (Reader<W>::kQuantised)
        next = {next_rows, next_offset};
      else
        next = piece;
      kMultiplyInPlace<W>.at[m - 1](x, in_place + g, scales.from_row(g), length, next, offset > 0,
                                    c + g, c_stride);
    }
    c += m * c_stride;
  }
}

template <typename W>
void multiply_rows(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
                   int64_t cache_bytes, float* c) {
  const W* const* rows = reinterpret_cast<const W* const*>(weights.rows);
  const int num_rows = weights.num_rows;
  const auto scales_at = [&weights](int row, int64_t offset) {
    return Scales{weights.scales, weights.group_size, offset}.from_row(row);
  };
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
        multiply_group(tiles, num_tiles, rows + r, scales_at(r, offset), length_at(offset),
                       rows + next, same ? offset + kPart : 0, c + r, num_rows);
      }
    }
  } else {
    // One part of the activations stays there, while that part of all weight rows passes by.
    for (int64_t offset = 0; offset < K; offset += kPart) {
      for (int r = 0; r < num_rows; r += kWideGroup) {
        const bool same = r + kWideGroup < num_rows;
        multiply_group(tiles, num_tiles, rows + r, scales_at(r, offset), length_at(offset),
                       rows + (same ? r + kWideGroup : 0),
                       same || offset + kPart >= K ? offset : offset + kPart, c + r, num_rows);
      }
    }
  }
}

void multiply(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
              int64_t cache_bytes, float* c) {
  switch (weights.format) {
    case WeightFormat::kFloat32:
      return multiply_rows<float>(tiles, num_tiles, weights, K, cache_bytes, c);
    case WeightFormat::kBFloat16:
      return multiply_rows<uint16_t>(tiles, num_tiles, weights, K, cache_bytes, c);
    case WeightFormat::kInt8:
      return multiply_rows<int8_t>(tiles, num_tiles, weights, K, cache_bytes, c);
    case WeightFormat::kInt4:
      return multiply_rows<Int4Pair>(tiles, num_tiles, weights, K, cache_bytes, c);
    case WeightFormat::kAsHiddenStates:  // moe() has said what that is
    case WeightFormat::kFloat16:         // check_cpu_weights() refuses it
      return;
  }
}

// ---- around the products --------------------------------------------------------------------

void pack(const float* const* rows, int m, int64_t K, WeightFormat /*format*/,
          int64_t /*group_size*/, void* packed) {
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

constexpr Kernels float_kernels(const char* name) {
  return {name,  kLanes, kTileRows, kMaxBlockRows, sizeof(float),
          false, pack,   multiply,  activate,      combine};
}

}  // namespace
}  // namespace adaptive_k::cpu
