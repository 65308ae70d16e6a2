// SPDX-License-Identifier: Apache-2.0
// Integers by AVX-512 or, where kVnni says so, its VNNI, for integer_impl.h.
#pragma once

#include "cpu/moe/kernels/avx512_nibbles.h"
#include "cpu/moe/kernels/x86_integers.h"

namespace adaptive_k::cpu {
namespace {

struct Integers : X86Integers {
  using I = __m512i;
  using B = __m512i;
  static constexpr int kBytes = 64;

  static void load_two(const int8_t* p, B* two) {
    two[0] = offset(_mm512_loadu_si512(p));
    two[1] = offset(_mm512_loadu_si512(p + kBytes));
  }
  static void load_two(const Int4Pair* p, B* two) {
    const B fifteen = _mm512_set1_epi8(15);
    const B pairs = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-120));  // both + 8
    two[0] = _mm512_and_si512(pairs, fifteen);
    two[1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), fifteen);
  }
  // What follows fewer weights meets activations of zero.
  static B load(const int8_t* p, int count) {
    return offset(_mm512_maskz_loadu_epi8(first_bytes(count), p));
  }
  static B load(const Int4Pair* p, int count) { return load_nibbles(p, count); }
  static B load_activations(const int8_t* p) { return _mm512_loadu_si512(p); }
  static B load_activations(const int8_t* p, int count) {
    return _mm512_maskz_loadu_epi8(first_bytes(count), p);
  }
  static I zero() { return _mm512_setzero_si512(); }
  template <typename W>
  static I dot(I sums, B weights, B activations) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, weights, activations);
#else
    if constexpr (std::is_same_v<W, int8_t>) {
      activations = _mm512_mask_sub_epi8(activations, _mm512_movepi8_mask(weights),
                                         _mm512_setzero_si512(), activations);
      weights = _mm512_abs_epi8(weights);
    }
    const __m512i pairs = _mm512_maddubs_epi16(weights, activations);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
  static __m128i reduce(const I* rows) {
    const auto pairs = [](I a, I b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const I even = pairs(rows[0], rows[2]), odd = pairs(rows[1], rows[3]);
    const I all =
        _mm512_add_epi32(_mm512_unpacklo_epi32(even, odd), _mm512_unpackhi_epi32(even, odd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }

 private:
  static B offset(B values) {
    return kVnni ? _mm512_xor_si512(values, _mm512_set1_epi8(-128)) : values;
  }
};

}  // namespace
}  // namespace adaptive_k::cpu
