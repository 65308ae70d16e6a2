// SPDX-License-Identifier: Apache-2.0
// Floats by AVX-512, for impl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/moe/kernels/kernels.h"

namespace adaptive_k::cpu {
namespace {

struct Simd {
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 6;
  static V zero() { return _mm512_setzero_ps(); }
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static V load(const int8_t* p) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
  }
  // The products of a scale with the 16 values that four bits have, looked up by those bits.
  struct ScaledInt4 {
    V products;
    void set_scale(float scale) {
      products = mul(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
                     broadcast(scale));
    }
    // Lane 2 i has value i, lane 2 i + 1 has value 8 + i: an even lane gets the first eight values,
    // an odd one the others, and shifts to its own. A lookup minds no more than four bits.
    V load(const Int4Pair* p) const {
      const __m512i eights =
          _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      const __m512i shifts =
          _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(eights, shifts), products);
    }
    static V arrange(V x) {
      return _mm512_permutexvar_ps(
          _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), x);
    }
    static V restore(V x) {
      return _mm512_permutexvar_ps(
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), x);
    }
  };
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static void reduce4(const V* a, float* sums) {
    // Halves: [a0 lower + a0 upper | a1 lower + a1 upper], and the same for a2 and a3.
    const V h01 = _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x44),
                                _mm512_shuffle_f32x4(a[0], a[1], 0xEE));
    const V h23 = _mm512_add_ps(_mm512_shuffle_f32x4(a[2], a[3], 0x44),
                                _mm512_shuffle_f32x4(a[2], a[3], 0xEE));
    // Quarters: 128 bits of a0, a1, a2, a3.
    V q = _mm512_add_ps(_mm512_shuffle_f32x4(h01, h23, 0x88), _mm512_shuffle_f32x4(h01, h23, 0xDD));
    q = _mm512_add_ps(q, _mm512_permute_ps(q, 0x4E));
    q = _mm512_add_ps(q, _mm512_permute_ps(q, 0xB1));
    _mm512_mask_compressstoreu_ps(sums, 0x1111, q);
  }
};

}  // namespace
}  // namespace adaptive_k::cpu
