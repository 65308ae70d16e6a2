// SPDX-License-Identifier: Apache-2.0
// What the kernels of AMX share: the tiles' shapes, and the way from sums to rows.
//
// Tiles: A is 16 weight rows by up to 64 bytes of K; B is those bytes, four to a row, by up to 16
// tokens; C is 16 weight rows by those tokens.
//
// No function of the standard library is instantiated here: compiled for this instruction set, it
// might stand in for another file's at link time.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/moe/kernels/kernels.h"
#include "cpu/scratch.h"

namespace adaptive_k::cpu {
namespace {

constexpr int kTile = 16;  // weight rows of a tile, rows of B, the most tokens
constexpr int kGroups = kPanelRows / kTile;
constexpr int kMaxBlockRows = 256;
constexpr int kLine = 64;  // bytes

// The intrinsics for tiles do not tell the compiler that they read memory: what is written for them
// has to be written by now.
inline void written(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

// The tiles' shapes, for as long as this lives. They are the thread's own state, and other
// libraries that use tiles set theirs before they do.
class Configuration {
 public:
  ~Configuration() { _tile_release(); }

  // For two tiles of B with so many tokens, and `depth` bytes of each row of A.
  void set(int tokens0, int tokens1, int depth = kLine) {
    if (tokens0 == tokens_[0] && tokens1 == tokens_[1] && depth == depth_) return;
    tokens_[0] = tokens0;
    tokens_[1] = tokens1;
    depth_ = depth;
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } data;
    static_assert(sizeof data == 64);
    // C 0 to 3, A 4 and 5, B 6 and 7.
    for (int i = 0; i < 8; ++i) {
      data.rows[i] = i < 6 ? kTile : depth / 4;
      data.row_bytes[i] = i == 4 || i == 5 ? depth : tokens_[i % 2] * 4;
    }
    written(&data);
    _tile_loadconfig(&data);
  }

 private:
  int tokens_[2] = {};
  int depth_ = 0;
};

// Where a tile's 16 rows lie, and how far it is to the tile that is next along K; in bytes.
struct Operand {
  const char* data;
  int64_t stride;
  int64_t step;
};

// Memory of the calling thread, for as long as the thread pool lives.
struct Buffers {
  FloatBuffer sums;
  FloatBuffer weights;
};

Buffers& buffers() {
  static thread_local Buffers* own = nullptr;
  if (own == nullptr) own = new Buffers;
  return *own;
}

template <typename W>
bool evenly_apart(const W* const* rows) {
  for (int r = 2; r < kTile; ++r)
    if (rows[r] - rows[r - 1] != rows[1] - rows[0]) return false;
  return true;
}

// Turns the rows of 16 by 16 numbers of 32 bits into columns.
void transpose(__m512i* v) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // v[i + j], i a multiple of 4: column 4 q + j of rows i to i + 3, for each quarter q.
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    w[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    w[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xDD);
    w[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    w[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xDD);
  }
  std::memcpy(v, w, sizeof w);
}

// For unpack(): sums that stay as they are.
struct AsTheyAre {
  __m512 operator()(__m512 sums) const { return sums; }
};

// c[i * num_rows + r] from the sums [groups][tiles][16 * 16]: kDense says that a weight row's
// tokens lie side by side there, [16][tokens], and not [16][16]. finish(g) gives what is done to
// the sums of a token with the rows of group g.
template <bool kDense, typename Finish>
void unpack(const float* acc, const Tile* tiles, int num_tiles, int num_rows, float* c,
            const Finish& finish) {
  for (int t = 0; t < num_tiles; ++t) {
    const int m = tiles[t].rows;
    const int stride = kDense ? m : kTile;
    const auto mask = static_cast<__mmask16>((1u << m) - 1);
    for (int g = 0; g < num_rows / kTile; ++g) {
      const float* tile = acc + (g * num_tiles + t) * kTile * kTile;
      __m512i v[kTile];
      for (int r = 0; r < kTile; ++r) v[r] = _mm512_maskz_loadu_epi32(mask, tile + r * stride);
      transpose(v);
      const auto finished = finish(g);
      for (int i = 0; i < m; ++i)
        _mm512_storeu_ps(c + i * num_rows + g * kTile, finished(_mm512_castsi512_ps(v[i])));
    }
    c += m * num_rows;
  }
}

}  // namespace
}  // namespace adaptive_k::cpu
