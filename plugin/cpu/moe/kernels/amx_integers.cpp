// SPDX-License-Identifier: Apache-2.0
// Integer weights times activations in int8 on AMX, by TDPBSSD; amx_tiles.h has the tiles. The sums
// of a block of activations are exact; as floats times the block's scales (and a group's, where
// weights have groups) they are added over rising blocks.
//
// int8 weights are read by the tiles where they lie. int4 are first unpacked, a part of 16 rows at
// a time, into the first-level cache. Meanwhile the next panel's rows are fetched in the order of
// memory, a few lines with each tile: tiles alone ask for too few lines at once.
//
// Activations are packed as B is read: the values of a tile of m <= 16 rows are stored [stride / 4]
// [m][4], zeros after K, its scales [blocks][m]. Sums of a tile are stored as [16][m], so that few
// tokens cost few additions. One or two tokens are packed and multiplied as without AMX.
#include <type_traits>

#include "cpu/moe/kernels/amx_tiles.h"
#include "cpu/moe/kernels/avx512_nibbles.h"
#include "cpu/moe/kernels/quantise.h"

namespace adaptive_k::cpu {
namespace {

// Elements of K that are taken together: what of two tiles of weights and two of tokens stays in
// the first-level cache.
constexpr int kPartLength = 256;
// For more tiles of tokens, int8 weights are copied as int4 are: rows lie in each other's way
// there.
constexpr int kTilesInPlace = 2;
// int4 become bytes 16 times as large: a nibble moves to the upper half of a byte, with its sign.
constexpr int kInt4Shift = 4;

// Elements of K in a tile: blocks are whole tiles.
int depth_of(const ActivationBlocks& blocks) { return blocks.length % kLine == 0 ? kLine : 32; }

// Whether the even elements of each kActivationBlock of int4 come first, and then the odd ones: two
// nibbles are told apart in one place.
template <typename W>
bool told_apart(const ActivationBlocks& blocks) {
  return std::is_same_v<W, Int4Pair> && blocks.length % kActivationBlock == 0;
}

const int8_t* at(const int8_t* row, int64_t k) { return row + k; }
const Int4Pair* at(const Int4Pair* row, int64_t k) { return row + k / 2; }

// 64 weights of a row, of which `count` are there; zeros after them.
__m512i load(const int8_t* row, int64_t count) {
  return _mm512_maskz_loadu_epi8(first_bytes(count), row);
}
__m512i load(const Int4Pair* row, int64_t count) {
  const __m512i values = _mm512_xor_si512(load_nibbles(row, count), _mm512_set1_epi8(8));
  return _mm512_slli_epi16(values, kInt4Shift);
}

void load_two(const int8_t* row, __m512i* two) {
  two[0] = _mm512_loadu_si512(row);
  two[1] = _mm512_loadu_si512(row + kLine);
}
void load_two(const Int4Pair* row, __m512i* two) {
  const __m512i pairs = _mm512_loadu_si512(row), upper = _mm512_set1_epi8(-16);
  two[0] = _mm512_and_si512(_mm512_slli_epi16(pairs, 4), upper);
  two[1] = _mm512_and_si512(pairs, upper);
}

// Copies 16 weight rows as tiles, [steps][16][depth]; those before `pairs_end` two tiles at a time.
template <typename W>
void copy_weights(const W* const* rows, int64_t offset, int length, int depth, int pairs_end,
                  int8_t* packed) {
  for (int k = 0; k < pairs_end; k += 2 * kLine) {
    int8_t* to = packed + k * kTile;
    for (int r = 0; r < kTile; ++r, to += kLine) {
      __m512i two[2];
      load_two(at(rows[r], offset + k), two);
      _mm512_store_si512(to, two[0]);
      _mm512_store_si512(to + kTile * kLine, two[1]);
    }
  }
  for (int k = pairs_end; k < length; k += kLine) {
    for (int r = 0; r < kTile; ++r) {
      const __m512i w = load(at(rows[r], offset + k), length - k);
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
  written(packed);
}

// The weights of the next panel, fetched in the order of memory while this one is multiplied.
struct Ahead {
  const char* groups[kGroups] = {};  // of 16 rows, null if there is none
  int lines = 0;                     // of a group, at each step along K

  void step() {
    for (const char*& group : groups) {
      if (group == nullptr) continue;
      for (int i = 0; i < lines; ++i, group += kLine) __builtin_prefetch(group, 0, 2);
    }
  }
};

// The rows and the tokens of the sums of a tile of m tokens, [16][m], in the order of memory.
struct Lanes {
  int32_t row[kTile][kTile];
  int32_t token[kTile][kTile];
};
struct AllLanes {  // by m
  alignas(kLine) Lanes of[kTile + 1];
};
constexpr AllLanes kSumLanes = [] {
  AllLanes lanes{};
  for (int m = 1; m <= kTile; ++m) {
    for (int i = 0; i < kTile * m; ++i) {
      lanes.of[m].row[i / kTile][i % kTile] = i / m;
      lanes.of[m].token[i / kTile][i % kTile] = i % m;
    }
  }
  return lanes;
}();

// Tokens' part of a product: packed values, and the scales of the blocks.
struct Columns {
  Operand b;
  const float* scales;  // of the first block
  int tokens;
};

// The sums of a block, until they are scaled and added.
template <int kA, int kB>
struct Sums {
  alignas(kLine) int32_t at[kA][kB][kTile * kTile];  // [16][tokens]
  __m512 x[kB];                                      // the tokens' scales
  __m512 w[kA];                                      // the weight rows', where they have groups

  // c += vectors `first` to `end` of each tile, as far as it has them, scaled.
  template <bool kGrouped, int kShift>
  void add(int first, int end, const Columns* columns, float* const (*c)[2]) const {
    for (int j = 0; j < kB; ++j) {
      const int m = columns[j].tokens;
      const Lanes& lanes = kSumLanes.of[m];
      for (int v = first; v < end && v < m; ++v) {
        const __m512 token = _mm512_permutexvar_ps(_mm512_load_si512(lanes.token[v]), x[j]);
        for (int i = 0; i < kA; ++i) {
          const __m512i sums = _mm512_srai_epi32(_mm512_load_si512(at[i][j] + v * kTile), kShift);
          __m512 value = _mm512_cvtepi32_ps(sums);
          if constexpr (kGrouped)
            value =
                _mm512_mul_ps(value, _mm512_permutexvar_ps(_mm512_load_si512(lanes.row[v]), w[i]));
          float* to = c[i][j] + v * kTile;
          _mm512_store_ps(to, _mm512_fmadd_ps(value, token, _mm512_load_ps(to)));
        }
      }
    }
  }
};

// The scales that 16 weight rows have in a group.
__m512 scales_of(const float* const* scales, int64_t group) {
  const auto eight = [&](const float* const* rows) {
    return _mm512_i64gather_ps(_mm512_loadu_si512(rows), reinterpret_cast<const float*>(4 * group),
                               1);
  };
  return _mm512_insertf32x8(_mm512_castps256_ps512(eight(scales)), eight(scales + kTile / 2), 1);
}

// kA tiles of weights times kB tiles of tokens over some blocks: c += the sums, scaled. scales are
// those of the weight rows, where they have groups. While the tiles of a block are multiplied, the
// sums of the one before are added.
template <int kA, int kB, bool kGrouped, typename W>
void multiply_blocks(const Operand* a, const Columns* columns, const ActivationBlocks& blocks,
                     int64_t first, int64_t end, int depth, const float* const* scales,
                     int64_t group_size, Ahead* ahead, float* const (*c)[2]) {
  constexpr int kShift = std::is_same_v<W, int8_t> ? 0 : kInt4Shift;
  Sums<kA, kB> sums[2];
  const int vectors =
      kB == 2 && columns[1].tokens > columns[0].tokens ? columns[1].tokens : columns[0].tokens;
  __mmask16 mask[kB];
  for (int j = 0; j < kB; ++j) mask[j] = static_cast<__mmask16>((1u << columns[j].tokens) - 1);
  int64_t s = 0;
  for (int64_t block = first; block < end; ++block) {
    const int64_t last = s + (blocks.length_of(block) + depth - 1) / depth;
    Sums<kA, kB>& own = sums[block & 1];
    const Sums<kA, kB>& before = sums[~block & 1];
    int added = block == first ? vectors : 0;
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
      ahead->step();
      if (added < vectors) {
        before.template add<kGrouped, kShift>(added, added + kTile / 2, columns, c);
        added += kTile / 2;
      }
    }
    if (added < vectors) before.template add<kGrouped, kShift>(added, kTile, columns, c);
    const int64_t stride = 4 * columns[0].tokens, stride1 = 4 * columns[kB - 1].tokens;
    _tile_stored(0, own.at[0][0], stride);
    if constexpr (kB == 2) _tile_stored(1, own.at[0][1], stride1);
    if constexpr (kA == 2) _tile_stored(2, own.at[1][0], stride);
    if constexpr (kA == 2 && kB == 2) _tile_stored(3, own.at[1][1], stride1);
    written(&own);
    for (int j = 0; j < kB; ++j)
      own.x[j] =
          _mm512_maskz_loadu_ps(mask[j], columns[j].scales + (block - first) * columns[j].tokens);
    if constexpr (kGrouped)
      for (int i = 0; i < kA; ++i)
        own.w[i] = scales_of(scales + i * kTile, block * blocks.length / group_size);
  }
  sums[(end - 1) & 1].template add<kGrouped, kShift>(0, vectors, columns, c);
}

template <bool kGrouped, typename W>
constexpr decltype(&multiply_blocks<1, 1, kGrouped, W>) kMultiplyBlocks[2][2] = {
    {multiply_blocks<1, 1, kGrouped, W>, multiply_blocks<1, 2, kGrouped, W>},
    {multiply_blocks<2, 1, kGrouped, W>, multiply_blocks<2, 2, kGrouped, W>}};

// The products of some tiles of tokens with weight rows, a panel and a part of K at a time.
template <typename W>
class Product {
 public:
  Product(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K, int64_t cache_bytes)
      : tiles_(tiles),
        num_tiles_(num_tiles),
        weights_(weights),
        rows_(reinterpret_cast<const W* const*>(weights.rows)),
        blocks_(K, weights.group_size),
        depth_(depth_of(blocks_)),
        grouped_(weights.group_size < K),
        groups_(weights.num_rows / kTile),
        panels_((groups_ + kGroups - 1) / kGroups) {
    in_place_ = std::is_same_v<W, int8_t> && num_tiles <= kTilesInPlace && K % depth_ == 0;
    for (int g = 0; in_place_ && g < groups_; ++g) in_place_ = evenly_apart(rows_ + g * kTile);
    part_blocks_ = in_place_ ? blocks_.count : kPartLength / blocks_.length;
    parts_ = (blocks_.count + part_blocks_ - 1) / part_blocks_;
    int64_t token_rows = 0;
    for (int t = 0; t < num_tiles; ++t) token_rows += tiles[t].rows;
    // As for bfloat16: where all activations stay in the second-level cache, each weight row is
    // read from end to end.
    by_panel_ = token_rows * K <= cache_bytes / 2;
  }

  void run(float* c) {
    const int64_t size = int64_t{groups_} * num_tiles_ * kTile * kTile;
    acc_ = buffers().sums.reserve(size);
    std::memset(acc_, 0, size * sizeof(float));
    for (int64_t i = 0; i < parts_ * panels_; ++i) multiply_unit(i);
    const int num_rows = weights_.num_rows;
    if (grouped_)  // scaled by block
      unpack<true>(acc_, tiles_, num_tiles_, num_rows, c, [](int) { return AsTheyAre(); });
    else
      unpack<true>(acc_, tiles_, num_tiles_, num_rows, c, [&](int g) {
        const __m512 scale = scales_of(weights_.scales + g * kTile, 0);
        return [scale](__m512 sums) { return _mm512_mul_ps(sums, scale); };
      });
  }

 private:
  // A panel and a part of K.
  struct Unit {
    int64_t panel, first, end;  // blocks
    int groups;
    int64_t offset;
    int length;
  };

  Unit unit(int64_t i) const {
    Unit u;
    u.panel = by_panel_ ? i / parts_ : i % panels_;
    u.first = (by_panel_ ? i % parts_ : i / panels_) * part_blocks_;
    u.end = u.first + part_blocks_ < blocks_.count ? u.first + part_blocks_ : blocks_.count;
    u.groups = groups_ - u.panel * kGroups < kGroups ? 1 : kGroups;
    u.offset = u.first * blocks_.length;
    u.length =
        static_cast<int>((u.end - 1) * blocks_.length + blocks_.length_of(u.end - 1) - u.offset);
    return u;
  }

  // Where group g of 16 rows begins, or one of those that come after this product's.
  const char* group_begin(int64_t g) const {
    if (g < groups_) return reinterpret_cast<const char*>(rows_[g * kTile]);
    return g - groups_ < kNextGroups ? static_cast<const char*>(weights_.next[g - groups_])
                                     : nullptr;
  }

  void multiply_unit(int64_t i) {
    constexpr bool kInt8 = std::is_same_v<W, int8_t>;
    const Unit u = unit(i);
    Operand a[kGroups];
    for (int g = 0; g < u.groups; ++g) {
      const W* const* rows = rows_ + u.panel * kPanelRows + g * kTile;
      if (in_place_) {
        a[g] = {reinterpret_cast<const char*>(rows[0]),
                (rows[1] - rows[0]) * static_cast<int64_t>(sizeof(W)), depth_};
        continue;
      }
      auto* room =
          reinterpret_cast<int8_t*>(buffers().weights.reserve(kPanelRows * kPartLength / 4)) +
          g * kTile * kPartLength;
      const bool in_pairs = depth_ == kLine && (kInt8 || told_apart<W>(blocks_));
      copy_weights(rows, u.offset, u.length, depth_,
                   in_pairs ? u.length / (2 * kLine) * 2 * kLine : 0, room);
      a[g] = {reinterpret_cast<const char*>(room), depth_, kTile * depth_};
    }
    Ahead ahead;
    if (by_panel_) {
      const int pairs = (num_tiles_ + 1) / 2;
      ahead.lines = kTile * depth_ / (kInt8 ? 1 : 2) / kLine / pairs;
      for (int g = 0; g < kGroups; ++g) {
        const char* begin = group_begin((u.panel + 1) * kGroups + g);
        if (begin != nullptr)
          ahead.groups[g] = begin + u.offset / depth_ * pairs * ahead.lines * kLine;
      }
    }
    for (int t = 0; t < num_tiles_; t += 2) {
      const int count = num_tiles_ - t > 1 ? 2 : 1;
      Columns columns[2];
      float* c[kGroups][2];
      for (int j = 0; j < count; ++j) {
        const int64_t m = tiles_[t + j].rows;
        const char* x = static_cast<const char*>(tiles_[t + j].x);
        columns[j] = {{x + u.offset * m, 4 * m, depth_ * m},
                      reinterpret_cast<const float*>(x + blocks_.stride * m) + u.first * m,
                      static_cast<int>(m)};
        for (int g = 0; g < u.groups; ++g)
          c[g][j] = acc_ + ((u.panel * kGroups + g) * num_tiles_ + t + j) * kTile * kTile;
      }
      configuration_.set(tiles_[t].rows, tiles_[t + count - 1].rows, depth_);
      const auto multiply = grouped_ ? kMultiplyBlocks<true, W>[u.groups - 1][count - 1]
                                     : kMultiplyBlocks<false, W>[u.groups - 1][count - 1];
      multiply(a, columns, blocks_, u.first, u.end, depth_, weights_.scales + u.panel * kPanelRows,
               weights_.group_size, &ahead, c);
    }
  }

  const Tile* tiles_;
  const int num_tiles_;
  const Weights& weights_;
  const W* const* rows_;
  const ActivationBlocks blocks_;
  const int depth_;
  const bool grouped_;
  const int groups_;
  const int64_t panels_;
  bool in_place_, by_panel_;
  int64_t part_blocks_, parts_;
  float* acc_ = nullptr;
  Configuration configuration_;
};

// Few tokens are bound by reading, which the vector kernels do faster.
bool are_few(int tokens) { return tokens <= 2; }

void multiply(const Tile* tiles, int num_tiles, const Weights& weights, int64_t K,
              int64_t cache_bytes, float* c) {
  // Tiles of one block are about as large as one another: one of so few is alone.
  if (are_few(tiles[0].rows))
    kAvx512VnniIntegerKernels.multiply(tiles, num_tiles, weights, K, cache_bytes, c);
  else if (weights.format == WeightFormat::kInt8)
    Product<int8_t>(tiles, num_tiles, weights, K, cache_bytes).run(c);
  else
    Product<Int4Pair>(tiles, num_tiles, weights, K, cache_bytes).run(c);
}

// Brings kActivationBlock values into the order in which int4 are told apart.
void tell_apart(int8_t* values) {
  const __m512i low = _mm512_loadu_si512(values), high = _mm512_loadu_si512(values + kLine);
  const auto bytes = [](__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)),
                              _mm512_cvtepi16_epi8(b), 1);
  };
  _mm512_storeu_si512(values, bytes(low, high));
  _mm512_storeu_si512(values + kLine, bytes(_mm512_srli_epi16(low, 8), _mm512_srli_epi16(high, 8)));
}

void pack(const float* const* rows, int m, int64_t K, WeightFormat format, int64_t group_size,
          void* packed) {
  if (are_few(m)) {
    kAvx512VnniIntegerKernels.pack(rows, m, K, format, group_size, packed);
    return;
  }
  const ActivationBlocks blocks(K, group_size);
  const bool apart = format == WeightFormat::kInt4 && told_apart<Int4Pair>(blocks);
  auto* values = static_cast<uint32_t*>(packed);
  auto* scales = reinterpret_cast<float*>(static_cast<char*>(packed) + m * blocks.stride);
  auto* room = reinterpret_cast<int8_t*>(buffers().weights.reserve(kTile * blocks.stride / 4));
  for (int i = 0; i < m; ++i) {
    int8_t* row = room + i * blocks.stride;
    for (int64_t b = 0; b < blocks.count; ++b) {
      int32_t sum;
      int8_t* to = row + b * blocks.length;
      const int64_t length = blocks.length_of(b);
      quantise(rows[i] + b * blocks.length, static_cast<int>(length), to, &scales[b * m + i], &sum);
      if (apart)
        for (int64_t k = 0; k + kActivationBlock <= length; k += kActivationBlock)
          tell_apart(to + k);
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
