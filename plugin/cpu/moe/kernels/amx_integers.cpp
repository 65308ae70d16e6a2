// SPDX-License-Identifier: Apache-2.0
// Integer weights times activations in int8 on AMX, by TDPBSSD; amx_tiles.h has the tiles. The sums
// of a block of activations are exact; as floats times the block's scales (and a group's, where
// weights have groups) they are added over rising blocks.
//
// int8 weights are read by the tiles where they lie. int4 are first unpacked, a part of 16 rows at
// a time, into the first-level cache.
//
// Activations are packed as B is read: the values of a tile of m <= 16 rows are stored [stride / 4]
// [m][4], zeros after K, its scales [blocks][m]. Few rows are packed and multiplied as without AMX.
#include <type_traits>

#include "cpu/moe/kernels/amx_tiles.h"
#include "cpu/moe/kernels/avx512_nibbles.h"
#include "cpu/moe/kernels/quantise.h"

namespace adaptive_k::cpu {
namespace {

// Elements of K that are taken together: what of two tiles of weights and two of tokens stays in
// the first-level cache.
constexpr int kPartLength = 512;
// For more tiles of tokens, int8 weights are copied as int4 are: rows lie in each other's way
// there.
constexpr int kTilesInPlace = 2;

// Elements of K in a tile: blocks are whole tiles.
int depth_of(const ActivationBlocks& blocks) { return blocks.length % kLine == 0 ? kLine : 32; }

const int8_t* at(const int8_t* row, int64_t k) { return row + k; }
const Int4Pair* at(const Int4Pair* row, int64_t k) { return row + k / 2; }

// 64 weights of a row from element k on, of which `count` are there; zeros after them.
__m512i load(const int8_t* row, int64_t k, int64_t count) {
  return _mm512_maskz_loadu_epi8(first_bytes(count), row + k);
}
__m512i load(const Int4Pair* row, int64_t k, int64_t count) {
  return _mm512_sub_epi8(load_nibbles(row + k / 2, count), _mm512_set1_epi8(8));
}

// Copies 16 weight rows as tiles, [steps][16][depth].
template <typename W>
void pack_weights(const W* const* rows, int64_t offset, int length, int depth, int8_t* packed) {
  for (int r = 0; r < kTile; ++r) {
    for (int k = 0; k < length; k += kLine) {
      const __m512i w = load(rows[r], offset + k, length - k);
      int8_t* to = packed + k * kTile + r * depth;
      if (depth == kLine) {
        _mm512_store_si512(to, w);
        continue;
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(w));
      if (k + depth < length)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + depth * kTile),
                           _mm512_extracti64x4_epi64(w, 1));
    }
  }
}

// Tokens' part of a product: packed values, and the scales of the blocks.
struct Columns {
  Operand b;
  const float* scales;  // of the first block
  int tokens;
};

// The sums of a block, until they are scaled and added.
template <int kA, int kB>
struct Sums {
  alignas(kLine) int32_t at[kA][kB][kTile * kTile];
  __m512 x[kB];  // the tokens' scales
  int64_t group = 0;

  // c += a row of each tile, scaled.
  void add_rows(int row, int count, const float* const* scales, float* const (*c)[2]) const {
    for (int r = row; r < row + count; ++r) {
      for (int i = 0; i < kA; ++i) {
        for (int j = 0; j < kB; ++j) {
          __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(at[i][j] + r * kTile));
          if (scales != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(scales[i * kTile + r][group]));
          float* to = c[i][j] + r * kTile;
          _mm512_store_ps(to, _mm512_fmadd_ps(v, x[j], _mm512_load_ps(to)));
        }
      }
    }
  }
};

// kA tiles of weights times kB tiles of tokens over some blocks: c += the sums, scaled. scales are
// those of the weight rows, or null where groups have none. While the tiles of a block are
// multiplied, the sums of the one before are added.
template <int kA, int kB>
void multiply_blocks(const Operand* a, const Columns* columns, const ActivationBlocks& blocks,
                     int64_t first, int64_t end, int depth, const float* const* scales,
                     int64_t group_size, float* const (*c)[2]) {
  Sums<kA, kB> sums[2];
  __mmask16 mask[kB];
  for (int j = 0; j < kB; ++j) mask[j] = static_cast<__mmask16>((1u << columns[j].tokens) - 1);
  int64_t s = 0;
  for (int64_t block = first; block < end; ++block) {
    const int64_t last = s + (blocks.length_of(block) + depth - 1) / depth;
    Sums<kA, kB>& own = sums[block & 1];
    const Sums<kA, kB>& before = sums[~block & 1];
    int added = block == first ? kTile : 0;
    _tile_zero(0);
    if constexpr (kB == 2) _tile_zero(1);
    if constexpr (kA == 2) _tile_zero(2);
    if constexpr (kA == 2 && kB == 2) _tile_zero(3);
    for (; s < last; ++s) {
      _tile_loadd(6, columns[0].b.data + s * columns[0].b.step, columns[0].b.stride);
      _tile_loadd(4, a[0].data + s * a[0].step, a[0].stride);
      _tile_dpbssd(0, 4, 6);
      if constexpr (kB == 2) {
        _tile_loadd(7, columns[1].b.data + s * columns[1].b.step, columns[1].b.stride);
        _tile_dpbssd(1, 4, 7);
      }
      if constexpr (kA == 2) {
        _tile_loadd(5, a[1].data + s * a[1].step, a[1].stride);
        _tile_dpbssd(2, 5, 6);
      }
      if constexpr (kA == 2 && kB == 2) _tile_dpbssd(3, 5, 7);
      if (added < kTile) {
        before.add_rows(added, kTile / 2, scales, c);
        added += kTile / 2;
      }
    }
    if (added < kTile) before.add_rows(added, kTile - added, scales, c);
    _tile_stored(0, own.at[0][0], kLine);
    if constexpr (kB == 2) _tile_stored(1, own.at[0][1], kLine);
    if constexpr (kA == 2) _tile_stored(2, own.at[1][0], kLine);
    if constexpr (kA == 2 && kB == 2) _tile_stored(3, own.at[1][1], kLine);
    written(&own);
    for (int j = 0; j < kB; ++j)
      own.x[j] =
          _mm512_maskz_loadu_ps(mask[j], columns[j].scales + (block - first) * columns[j].tokens);
    own.group = scales == nullptr ? 0 : block * blocks.length / group_size;
  }
  sums[(end - 1) & 1].add_rows(0, kTile, scales, c);
}

constexpr decltype(&multiply_blocks<1, 1>) kMultiplyBlocks[2][2] = {
    {multiply_blocks<1, 1>, multiply_blocks<1, 2>}, {multiply_blocks<2, 1>, multiply_blocks<2, 2>}};

// What a panel of one or two groups of 16 weight rows is, from block `first` to block `end`.
template <typename W>
void multiply_panel(const Tile* tiles, int num_tiles, const W* const* rows,
                    const float* const* scales, int64_t group_size, int groups,
                    const ActivationBlocks& blocks, int64_t first, int64_t end,
                    const W* const* next_rows, Configuration* configuration, float* acc) {
  const int depth = depth_of(blocks);
  const int64_t offset = first * blocks.length;
  const int length =
      static_cast<int>((end - 1) * blocks.length + blocks.length_of(end - 1) - offset);
  Operand a[kGroups];
  for (int g = 0; g < groups; ++g) {
    const W* const* of_group = rows + g * kTile;
    if (std::is_same_v<W, int8_t> && num_tiles <= kTilesInPlace && length % depth == 0 &&
        evenly_apart(of_group)) {
      a[g] = {reinterpret_cast<const char*>(of_group[0] + offset),
              (of_group[1] - of_group[0]) * static_cast<int64_t>(sizeof(W)), depth};
    } else {
      float* room =
          buffers().weights.reserve(kPanelRows * kPartLength / 4) + g * kTile * kPartLength / 4;
      auto* packed = reinterpret_cast<int8_t*>(room);
      pack_weights(of_group, offset, length, depth, packed);
      written(packed);
      a[g] = {reinterpret_cast<const char*>(packed), depth, kTile * depth};
    }
  }
  // Rows of integers are so short that the processor's own prefetching comes late.
  if (num_tiles <= kTilesInPlace) {
    for (int r = 0; r < groups * kTile; ++r)
      for (int k = 0; k < length; k += std::is_same_v<W, int8_t> ? kLine : 2 * kLine)
        __builtin_prefetch(at(next_rows[r], offset + k), 0, 2);
  }
  for (int t = 0; t < num_tiles; t += 2) {
    const int count = num_tiles - t > 1 ? 2 : 1;
    Columns columns[2];
    float* c[kGroups][2];
    for (int j = 0; j < count; ++j) {
      const int64_t m = tiles[t + j].rows;
      const char* x = static_cast<const char*>(tiles[t + j].x);
      columns[j] = {{x + offset * m, 4 * m, depth * m},
                    reinterpret_cast<const float*>(x + blocks.stride * m) + first * m,
                    static_cast<int>(m)};
      for (int g = 0; g < groups; ++g) c[g][j] = acc + (g * num_tiles + t + j) * kTile * kTile;
    }
    configuration->set(tiles[t].rows, tiles[t + count - 1].rows, depth);
    kMultiplyBlocks[groups - 1][count - 1](a, columns, blocks, first, end, depth, scales,
                                           group_size, c);
  }
}

template <typename W>
void multiply_rows(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
                   int64_t cache_bytes, float* c) {
  const W* const* rows = reinterpret_cast<const W* const*>(weights.rows);
  const ActivationBlocks blocks(K, weights.group_size);
  const bool grouped = weights.group_size < K;
  const int num_rows = weights.num_rows;
  int64_t token_rows = 0;
  for (int t = 0; t < num_tiles; ++t) token_rows += tiles[t].rows;
  const int64_t sums = static_cast<int64_t>(num_rows) * num_tiles * kTile;
  float* acc = buffers().sums.reserve(sums);
  std::memset(acc, 0, sums * sizeof(float));
  const int64_t part_blocks = kPartLength / blocks.length;
  const int64_t parts = (blocks.count + part_blocks - 1) / part_blocks;
  const int64_t panels = (num_rows + kPanelRows - 1) / kPanelRows;
  // As for bfloat16: where all activations stay in the second-level cache, each weight row is read
  // from end to end.
  const bool by_panel = token_rows * K <= cache_bytes / 2;
  Configuration configuration;
  for (int64_t i = 0; i < parts * panels; ++i) {
    const int64_t first = (by_panel ? i % parts : i / panels) * part_blocks;
    const int row = static_cast<int>(by_panel ? i / parts : i % panels) * kPanelRows;
    const int groups = num_rows - row < kPanelRows ? 1 : kGroups;
    const int64_t end = first + part_blocks < blocks.count ? first + part_blocks : blocks.count;
    const W* const* next = rows + (row + 2 * kPanelRows <= num_rows ? row + kPanelRows : row);
    multiply_panel(tiles, num_tiles, rows + row, grouped ? weights.scales + row : nullptr,
                   weights.group_size, groups, blocks, first, end, next, &configuration,
                   acc + static_cast<int64_t>(row) * num_tiles * kTile);
  }
  if (!grouped) {
    for (int r = 0; r < num_rows; ++r) {
      const __m512 scale = _mm512_set1_ps(weights.scales[r][0]);
      for (int t = 0; t < num_tiles; ++t) {
        float* row = acc + ((r / kTile * num_tiles + t) * kTile + r % kTile) * kTile;
        _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), scale));
      }
    }
  }
  unpack(acc, tiles, num_tiles, num_rows, c);
}

// Few tokens are bound by reading, which the vector kernels do faster: as many as one of their
// tiles.
bool are_few(int tokens) { return tokens <= kAvx512VnniIntegerKernels.tile_rows; }

void multiply(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
              int64_t cache_bytes, float* c) {
  // Tiles of one block are about as large as one another: one of so few is alone.
  if (are_few(tiles[0].rows))
    kAvx512VnniIntegerKernels.multiply(tiles, num_tiles, weights, K, cache_bytes, c);
  else if (weights.format == WeightFormat::kInt8)
    multiply_rows<int8_t>(tiles, num_tiles, weights, K, cache_bytes, c);
  else
    multiply_rows<Int4Pair>(tiles, num_tiles, weights, K, cache_bytes, c);
}

void pack(const float* const* rows, int m, int64_t K, WeightFormat format, int64_t group_size,
          void* packed) {
  if (are_few(m)) {
    kAvx512VnniIntegerKernels.pack(rows, m, K, format, group_size, packed);
    return;
  }
  const ActivationBlocks blocks(K, group_size);
  auto* values = static_cast<uint32_t*>(packed);
  auto* scales = reinterpret_cast<float*>(static_cast<char*>(packed) + m * blocks.stride);
  auto* room = reinterpret_cast<int8_t*>(buffers().weights.reserve(kTile * blocks.stride / 4));
  for (int i = 0; i < m; ++i) {
    int8_t* row = room + i * blocks.stride;
    for (int64_t b = 0; b < blocks.count; ++b) {
      int32_t sum;
      quantise(rows[i] + b * blocks.length, static_cast<int>(blocks.length_of(b)),
               row + b * blocks.length, &scales[b * m + i], &sum);
    }
    std::memset(row + K, 0, blocks.stride - K);
  }
  const auto mask = static_cast<__mmask16>((1u << m) - 1);
  for (int64_t k = 0; k < blocks.stride; k += kLine) {
    __m512i v[kTile] = {};
    for (int i = 0; i < m; ++i) v[i] = _mm512_loadu_si512(room + i * blocks.stride + k);
    transpose(v);
    for (int word = 0; word < kLine / 4; ++word)
      _mm512_mask_storeu_epi32(values + (k / 4 + word) * m, mask, v[word]);
  }
}

void activate(Activation activation, const float* c, int64_t c_stride, int rows, int64_t first,
              int64_t I, int64_t padded_I, void* tile) {
  kAvx512VnniIntegerKernels.activate(activation, c, c_stride, rows, first, I, padded_I, tile);
}

void combine(const float* const* y, const float* weights, int k, int n, float* out) {
  kAvx512Kernels.combine(y, weights, k, n, out);
}

}  // namespace

const Kernels kAmxIntegerKernels = {"amx", 1,    kTile,    kMaxBlockRows, 1,
                                    true,  pack, multiply, activate,      combine};

}  // namespace adaptive_k::cpu
