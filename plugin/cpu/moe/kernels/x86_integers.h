// SPDX-License-Identifier: Apache-2.0
// What AVX2 and AVX-512 share of `Integers` (integer_impl.h). kVnni is defined beforehand.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "cpu/moe/kernels/kernels.h"

namespace adaptive_k::cpu {
namespace {

struct X86Integers {
  // VNNI multiplies unsigned with signed numbers, and so does vpmaddubsw: int4 come as 0 to 15, and
  // int8 with VNNI as 0 to 255. Two products of such an int8 could pass the 16 bits of a sum that
  // vpmaddubsw has, so without VNNI signs move to the activation.
  template <typename W>
  static constexpr int32_t kOffset = !std::is_same_v<W, int8_t> ? 8
                                     : kVnni                    ? 128
                                                                : 0;

  struct Four {
    __m128 v;

    static Four zero() { return {_mm_setzero_ps()}; }
    static Four of(__m128i sums, int32_t offset) {
      return {_mm_cvtepi32_ps(_mm_add_epi32(sums, _mm_set1_epi32(offset)))};
    }
    Four times(float a, float b, float c, float d) const {
      return {_mm_mul_ps(v, _mm_setr_ps(a, b, c, d))};
    }
    Four times_plus(float factor, Four other) const {
      return {_mm_fmadd_ps(v, _mm_set1_ps(factor), other.v)};
    }
    void store(float* to) const { _mm_storeu_ps(to, v); }
  };
};

}  // namespace
}  // namespace adaptive_k::cpu
