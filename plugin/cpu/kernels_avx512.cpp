// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include <cstdint>

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
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
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

#define ADAPTIVE_K_TILE_ROWS 6
#include "kernels_impl.h"

namespace adaptive_k::cpu {
const Kernels kAvx512Kernels = {"avx512", kLanes,   kTileRows, kMaxBlockRows, sizeof(float),
                                pack,     multiply, activate,  combine};
}  // namespace adaptive_k::cpu
