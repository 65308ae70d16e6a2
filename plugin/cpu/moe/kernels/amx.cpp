// SPDX-License-Identifier: Apache-2.0
// bfloat16 weights on AMX. Activations are rounded to bfloat16 (to nearest, ties to even), products
// are summed in float32 by TDPBF16PS, which takes subnormal numbers as zeros.
//
// Tiles: A is 16 weight rows by 32 elements of K, straight from where the weights lie; B is 16
// pairs of elements by up to 16 tokens; C is 16 weight rows by those tokens. An element of C is
// summed over rising K, 32 elements at a time, and does not depend on the other columns.
//
// Activations are packed as B is read: a tile of m <= 16 rows is stored [padded K / 2][m][2].
//
// Weights are neither packed nor prefetched, as the processor itself follows the rows: at Mixtral's
// sizes prefetching made decode slower by a tenth or more, and prefill faster by 7 % at most.
//
// No function of the standard library is instantiated here: compiled for this instruction set, it
// might stand in for another file's at link time.
#include "cpu/moe/kernels/amx_tiles.h"

namespace adaptive_k::cpu {
namespace {

constexpr int kDepth = 32;  // elements of K in a tile

// kA tiles of weights times kB tiles of tokens: c = or c += the sums. c[i][j] is 16 by 16 floats,
// of which the tile's tokens are the first of each row.
template <int kA, int kB>
void multiply_tiles(const Operand* a, const Operand* b, int steps, bool add, float* const (*c)[2]) {
  if (add) {
    _tile_loadd(0, c[0][0], kLine);
    if constexpr (kB == 2) _tile_loadd(1, c[0][1], kLine);
    if constexpr (kA == 2) _tile_loadd(2, c[1][0], kLine);
    if constexpr (kA == 2 && kB == 2) _tile_loadd(3, c[1][1], kLine);
  } else {
    _tile_zero(0);
    if constexpr (kB == 2) _tile_zero(1);
    if constexpr (kA == 2) _tile_zero(2);
    if constexpr (kA == 2 && kB == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, b[0].data + s * b[0].step, b[0].stride);
    _tile_loadd(4, a[0].data + s * a[0].step, a[0].stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kB == 2) {
      _tile_loadd(7, b[1].data + s * b[1].step, b[1].stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kA == 2) {
      _tile_loadd(5, a[1].data + s * a[1].step, a[1].stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kA == 2 && kB == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c[0][0], kLine);
  if constexpr (kB == 2) _tile_stored(1, c[0][1], kLine);
  if constexpr (kA == 2) _tile_stored(2, c[1][0], kLine);
  if constexpr (kA == 2 && kB == 2) _tile_stored(3, c[1][1], kLine);
}

constexpr decltype(&multiply_tiles<1, 1>) kMultiplyTiles[2][2] = {
    {multiply_tiles<1, 1>, multiply_tiles<1, 2>}, {multiply_tiles<2, 1>, multiply_tiles<2, 2>}};

// Copies 16 weight rows as tiles, [steps][16][32], with zeros to the end of the last. For rows that
// a tile cannot be read from: those whose end is not a tile's, or that are not evenly apart.
void pack_weights(const uint16_t* const* rows, int length, uint16_t* packed) {
  for (int r = 0; r < kTile; ++r) {
    for (int k = 0; k < length; k += kDepth) {
      const __mmask32 mask = length - k >= kDepth ? ~0u : (1u << (length - k)) - 1;
      _mm512_store_si512(packed + k * kTile + r * kDepth,
                         _mm512_maskz_loadu_epi16(mask, rows[r] + k));
    }
  }
}

// One part of K of all tiles, for one or two groups of 16 weight rows. acc is
// [groups][tiles][16][16].
void multiply_panel(const Tile* tiles, int num_tiles, const uint16_t* const* rows, int groups,
                    int64_t offset, int length, Configuration* configuration, float* acc) {
  const int steps = (length + kDepth - 1) / kDepth;
  Operand a[kGroups];
  for (int g = 0; g < groups; ++g) {
    const uint16_t* part[kTile];
    for (int r = 0; r < kTile; ++r) part[r] = rows[g * kTile + r] + offset;
    if (num_tiles <= 2 && length % kDepth == 0 && evenly_apart(part)) {
      a[g] = {reinterpret_cast<const char*>(part[0]),
              (part[1] - part[0]) * static_cast<int64_t>(sizeof(uint16_t)), kLine};
    } else {
      float* room = buffers().weights.reserve(kPanelRows * kPart / 2) + g * kTile * kPart / 2;
      uint16_t* packed = reinterpret_cast<uint16_t*>(room);
      pack_weights(part, length, packed);
      written(packed);
      a[g] = {reinterpret_cast<const char*>(packed), kLine, kTile * kLine};
    }
  }
  for (int t = 0; t < num_tiles; t += 2) {
    const int count = num_tiles - t > 1 ? 2 : 1;
    Operand b[2];
    float* c[kGroups][2];
    for (int j = 0; j < count; ++j) {
      const Tile& tile = tiles[t + j];
      b[j] = {static_cast<const char*>(tile.x) + offset * tile.rows * sizeof(uint16_t),
              4 * tile.rows, kTile * 4 * tile.rows};
      for (int g = 0; g < groups; ++g) c[g][j] = acc + (g * num_tiles + t + j) * kTile * kTile;
    }
    configuration->set(tiles[t].rows, tiles[t + count - 1].rows);
    kMultiplyTiles[groups - 1][count - 1](a, b, steps, offset > 0, c);
  }
}

void multiply(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
              int64_t cache_bytes, float* c) {
  const uint16_t* const* rows = reinterpret_cast<const uint16_t* const*>(weights.rows);
  const int num_rows = weights.num_rows;
  int64_t token_rows = 0;
  for (int t = 0; t < num_tiles; ++t) token_rows += tiles[t].rows;
  float* acc = buffers().sums.reserve(static_cast<int64_t>(num_rows) * num_tiles * kTile);
  const int64_t parts = (K + kPart - 1) / kPart;
  const int64_t panels = (num_rows + kPanelRows - 1) / kPanelRows;
  // Where all activations stay in the second-level cache, each weight row is read from end to end.
  // Else one part of them stays there, while that part of all weight rows passes by.
  const bool by_panel = token_rows * K * static_cast<int64_t>(sizeof(uint16_t)) <= cache_bytes / 2;
  Configuration configuration;
  for (int64_t i = 0; i < parts * panels; ++i) {
    const int64_t offset = (by_panel ? i % parts : i / panels) * kPart;
    const int row = static_cast<int>(by_panel ? i / parts : i % panels) * kPanelRows;
    const int groups = num_rows - row < kPanelRows ? 1 : kGroups;
    const int length = static_cast<int>(K - offset < kPart ? K - offset : kPart);
    multiply_panel(tiles, num_tiles, rows + row, groups, offset, length, &configuration,
                   acc + static_cast<int64_t>(row) * num_tiles * kTile);
  }
  unpack<false>(acc, tiles, num_tiles, num_rows, c, [](int) { return AsTheyAre(); });
}

// ---- around the products --------------------------------------------------------------------

// Rounds 32 floats; element i of the result is that of the i-th.
__m512i to_bfloat16(__m512 low, __m512 high) {
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  __m512i bits;
  std::memcpy(&bits, &both, sizeof bits);
  return bits;
}

// Stores `pairs` pairs of elements of m rows as [pairs][m]. Changes v, which has room for 16 rows.
void store_pairs(__m512i* v, int m, int pairs, uint32_t* to) {
  transpose(v);
  const __mmask16 mask = static_cast<__mmask16>((1u << m) - 1);
  for (int p = 0; p < pairs; ++p) _mm512_mask_storeu_epi32(to + p * m, mask, v[p]);
}

void pack(const float* const* rows, int m, int64_t K, WeightFormat /*format*/,
          int64_t /*group_size*/, void* packed) {
  uint32_t* to = static_cast<uint32_t*>(packed);
  const auto load = [](const float* from, int64_t count) {
    const unsigned all = (1u << kTile) - 1;
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(count >= kTile ? all
                                                        : count > 0    ? (1u << count) - 1
                                                                       : 0),
                                 from);
  };
  for (int64_t k = 0; k < K; k += kDepth, to += kTile * m) {
    __m512i v[kTile] = {};
    for (int i = 0; i < m; ++i)
      v[i] = to_bfloat16(load(rows[i] + k, K - k), load(rows[i] + k + kTile, K - k - kTile));
    store_pairs(v, m, kTile, to);
  }
}

void activate(Activation activation, const float* c, int64_t c_stride, int rows, int64_t first,
              int64_t I, int64_t padded_I, void* tile) {
  const int neurons = is_gated(activation) ? kPanelRows / 2 : kPanelRows;
  alignas(64) float h[kPanelRows * kTile] = {};  // [neurons / 16][rows][16]
  kAvx512Kernels.activate(activation, c, c_stride, rows, 0, I - first, neurons, h);
  __m512i v[kTile] = {};
  for (int i = 0; i < rows; ++i) {
    const float* low = h + i * kTile;
    v[i] = to_bfloat16(_mm512_load_ps(low),
                       neurons > kTile ? _mm512_load_ps(low + rows * kTile) : _mm512_setzero_ps());
  }
  uint32_t* pairs = static_cast<uint32_t*>(tile);
  store_pairs(v, rows, neurons / 2, pairs + first / 2 * rows);
  if (first + neurons >= I)
    std::memset(pairs + (first + neurons) / 2 * rows, 0,
                (padded_I - first - neurons) / 2 * rows * sizeof(uint32_t));
}

void combine(const float* const* y, const float* weights, int k, int n, float* out) {
  kAvx512Kernels.combine(y, weights, k, n, out);
}

}  // namespace

const Kernels kAmxKernels = {"amx", kDepth, kTile,    kMaxBlockRows, sizeof(uint16_t),
                             false, pack,   multiply, activate,      combine};

}  // namespace adaptive_k::cpu
