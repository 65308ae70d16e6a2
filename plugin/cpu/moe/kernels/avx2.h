// SPDX-License-Identifier: Apache-2.0
// Floats by AVX2, for impl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/moe/kernels/kernels.h"

namespace adaptive_k::cpu {
namespace {

struct Simd {
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTileRows = 3;
  static V zero() { return _mm256_setzero_ps(); }
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static V load(const int8_t* p) {
    const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
  }
  static V load(const Int4Pair* p) {
    // Eight values in every lane: the lane's own goes to the top and comes down with its sign.
    const __m256i eights = _mm256_broadcastd_epi32(_mm_loadu_si32(p));
    const __m256i shifts = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sllv_epi32(eights, shifts), 28));
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static void reduce4(const V* a, float* sums) {
    const V h01 = _mm256_hadd_ps(a[0], a[1]);
    const V h23 = _mm256_hadd_ps(a[2], a[3]);
    const V h = _mm256_hadd_ps(h01, h23);  // the sums of the lower and of the upper 4 lanes
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
  }
};

}  // namespace
}  // namespace adaptive_k::cpu
