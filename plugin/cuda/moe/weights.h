// SPDX-License-Identifier: Apache-2.0
// The formats of experts' weights on GPUs: all that the kernels know of one that is quantised.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/numeric.h"
#include "operator/weight_format.h"

namespace adaptive_k::cuda {

// Integers become floats without the slow conversion instructions: an unsigned byte u in the low
// bits of 2^23 makes the float 2^23 + u, exactly.
constexpr uint32_t kTwoTo23 = 0x4b000000u;

__device__ __forceinline__ void unpack_int8(uint32_t word, float* to) {
  const uint32_t biased = word ^ 0x80808080u;  // -128 .. 127 -> 0 .. 255
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if defined(ADAPTIVE_K_SIMT)
    const uint32_t bits = kTwoTo23 | (biased >> (8 * i) & 0xffu);
#else
    const uint32_t bits = __byte_perm(biased, kTwoTo23, 0x7440 | i);
#endif
    to[i] = bit_copy<float>(bits) - (8388608.0f + 128.0f);
  }
}

// The first kCount of the eight values of a word.
template <int kCount = 8>
__device__ __forceinline__ void unpack_int4(uint32_t word, float* to) {
  const uint32_t biased = word ^ 0x88888888u;  // -8 .. 7 -> 0 .. 15
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    to[i] = bit_copy<float>(kTwoTo23 | (biased >> (4 * i) & 0xfu)) - (8388608.0f + 8.0f);
}

// kCount values of a quantised format from its first-th on, where words begins at value 0. They lie
// in one word, or begin one.
template <WeightFormat format, int kCount>
__device__ __forceinline__ void unpack_quantised(const uint32_t* words, int first, float* to) {
  static_assert(format == WeightFormat::kInt8 || format == WeightFormat::kInt4,
                "a case for each of on_gpus()");
  if constexpr (format == WeightFormat::kInt8) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) unpack_int8(words[first / 4 + i], to + 4 * i);
  } else {
    unpack_int4<kCount>(words[first / 8] >> (first % 8 * 4), to);
  }
}

// Eight neighbouring values of a quantised format as four pairs of 16-bit numbers, in their order
// and exactly: what the tensor cores take. words begins at the first of them.
//
// A small number in the low bits of 2^10 (float16) or 2^7 (bfloat16) makes the sum of the two; one
// subtraction for each pair takes that off again. bfloat16 has room for seven bits there: of an
// int8, the sign goes into the exponent's last bit, which makes 2^7 into 2^8, and this is what is
// taken off.
template <typename T, WeightFormat format>
__device__ __forceinline__ void unpack_pairs(const uint32_t* words, uint32_t (&pairs)[4]) {
  static_assert(format == WeightFormat::kInt8 || format == WeightFormat::kInt4,
                "a case for each of on_gpus()");
  constexpr uint32_t kOne = T::kIsBFloat16 ? 0x43004300u : 0x64006400u;  // 128 or 1024, twice
  constexpr uint32_t kBytes[2] = {0x4140u, 0x4342u};  // value 0 or 2, the other word's, 1 or 3, ...
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (format == WeightFormat::kInt4) {
      // Byte i holds both values: the low bits of the word and of the word shifted by half a byte.
      constexpr uint32_t kCentre = T::kIsBFloat16 ? 0x43084308u : 0x64086408u;  // 136 or 1032
      const uint32_t both = pick_bytes(words[0], words[0] >> 4, 0x4400u + 0x1111u * i);
      pairs[i] = subtract_pairs<T>(mask_and_flip<0x000f000fu, kCentre>(both), kCentre);
    } else if constexpr (T::kIsBFloat16) {
      const uint32_t both = pick_bytes(words[i / 2], 0, kBytes[i % 2]);
      pairs[i] = subtract_pairs<T>(mask_and_flip<0x007f007fu, kOne>(both),
                                   mask_and_flip<0x00800080u, kOne>(both));
    } else {
      const uint32_t both = pick_bytes(words[i / 2] ^ 0x80808080u, kOne >> 8, kBytes[i % 2]);
      pairs[i] = subtract_pairs<T>(both, 0x64806480u);  // 1024 + 128
    }
  }
}

// Calls body(integral_constant) with a quantised format.
template <typename Body>
auto with_quantised(WeightFormat format, const Body& body) {
  if (format == WeightFormat::kInt8)
    return body(std::integral_constant<WeightFormat, WeightFormat::kInt8>());
  return body(std::integral_constant<WeightFormat, WeightFormat::kInt4>());
}

// How many weights 16 bytes of format hold.
template <typename T, WeightFormat format>
struct WeightVector {
  static constexpr int kSize = is_quantised(format) ? row_multiple(format) : Vector16<T>::kSize;
};

// Of `count` neighbouring weights.
inline int64_t weight_bytes(ElementType element, WeightFormat format, int64_t count) {
  return count * (is_quantised(format) ? bits_of(format) : 8 * element_bytes(element)) / 8;
}

}  // namespace adaptive_k::cuda
