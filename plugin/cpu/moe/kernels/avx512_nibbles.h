// SPDX-License-Identifier: Apache-2.0
// Bytes and int4 in the order of a row, for AVX-512 and AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/moe/kernels/kernels.h"

namespace adaptive_k::cpu {
namespace {

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// The first `count` of 64 int4, each 8 more than it is, as bytes; 8 after them. Two nibbles of a
// byte become two bytes of 16 bits, the low one first.
inline __m512i load_nibbles(const Int4Pair* p, int64_t count) {
  const auto mask = static_cast<__mmask32>(first_bytes(count / 2));
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, p));
  // ((pairs | pairs << 4) & 15) ^ 8: the first by one ternary operation.
  const __m512i apart =
      _mm512_ternarylogic_epi64(pairs, _mm512_slli_epi16(pairs, 4), _mm512_set1_epi8(15), 0xA8);
  return _mm512_xor_si512(apart, _mm512_set1_epi8(8));
}

}  // namespace
}  // namespace adaptive_k::cpu
