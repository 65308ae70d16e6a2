// SPDX-License-Identifier: Apache-2.0
// Integers by AVX2 or, where kVnni says so, AVX-VNNI, for integer_impl.h.
#pragma once

#include "cpu/moe/kernels/x86_integers.h"

namespace adaptive_k::cpu {
namespace {

struct Integers : X86Integers {
  using I = __m256i;
  using B = __m256i;
  static constexpr int kBytes = 32;

  static void load_two(const int8_t* p, B* two) {
    two[0] = load(p, kBytes);
    two[1] = load(p + kBytes, kBytes);
  }
  static void load_two(const Int4Pair* p, B* two) {
    const B fifteen = _mm256_set1_epi8(15);
    const B pairs = _mm256_xor_si256(load_activations(reinterpret_cast<const int8_t*>(p)),
                                     _mm256_set1_epi8(-120));  // both + 8
    two[0] = _mm256_and_si256(pairs, fifteen);
    two[1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), fifteen);
  }
  // Two nibbles of a byte become two bytes of 16 bits, the low one first.
  static B load(const Int4Pair* p, int /*count: groups are multiples of 32*/) {
    const __m256i pairs =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i apart = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    return _mm256_xor_si256(_mm256_and_si256(apart, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
  }
  // The other half of fewer weights meets activations of zero.
  static B load(const int8_t* p, int count) {
    const B values = load_activations(p, count);
    return kVnni ? _mm256_xor_si256(values, _mm256_set1_epi8(-128)) : values;
  }
  static B load_activations(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static B load_activations(const int8_t* p, int count) {
    if (count == kBytes) return load_activations(p);
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I zero() { return _mm256_setzero_si256(); }
  template <typename W>
  static I dot(I sums, B weights, B activations) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, weights, activations);
#else
    if constexpr (std::is_same_v<W, int8_t>) {
      activations = _mm256_sign_epi8(activations, weights);
      weights = _mm256_abs_epi8(weights);
    }
    const __m256i pairs = _mm256_maddubs_epi16(weights, activations);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  }
  static __m128i reduce(const I* rows) {
    const I h =
        _mm256_hadd_epi32(_mm256_hadd_epi32(rows[0], rows[1]), _mm256_hadd_epi32(rows[2], rows[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  }
};

}  // namespace
}  // namespace adaptive_k::cpu
