// SPDX-License-Identifier: Apache-2.0
// Sixteen-bit numbers and quantised weights as floats, sixteen bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/interface.h"

#if !defined(ADAPTIVE_K_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace adaptive_k::cuda {

struct Half {
  static constexpr bool kIsBFloat16 = false;
  uint16_t bits;
};
struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  uint16_t bits;
};

#if defined(ADAPTIVE_K_SIMT)
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity and NaN
    return bit_copy<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return bit_copy<float>(sign | ((magnitude << 13) + (112u << 23)));
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7fffu);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition itself.
    const float shifted = bit_copy<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + odd - (112u << 23)) >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) {
#if defined(ADAPTIVE_K_SIMT)
  return half_to_float(value.bits);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}
__device__ __forceinline__ float to_float(BFloat16 value) {
  return bit_copy<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
#if defined(ADAPTIVE_K_SIMT)
  return {float_to_half(value)};
#else
  return {__half_as_ushort(__float2half_rn(value))};
#endif
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#if defined(ADAPTIVE_K_SIMT)
  return {float_to_bfloat16(value)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
}

// The two numbers of a word, the one at the lower address first.
template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t word, float* to);
template <>
__device__ __forceinline__ void unpack_pair<Half>(uint32_t word, float* to) {
#if defined(ADAPTIVE_K_SIMT)
  to[0] = half_to_float(static_cast<uint16_t>(word));
  to[1] = half_to_float(static_cast<uint16_t>(word >> 16));
#else
  const float2 pair = __half22float2(bit_copy<__half2>(word));
  to[0] = pair.x;
  to[1] = pair.y;
#endif
}
template <>
__device__ __forceinline__ void unpack_pair<BFloat16>(uint32_t word, float* to) {
  to[0] = bit_copy<float>(word << 16);
  to[1] = bit_copy<float>(word & 0xffff0000u);
}

// Four of the eight bytes of low (0 to 3) and high (4 to 7): those that the selector's digits name,
// from its lowest digit on.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(ADAPTIVE_K_SIMT)
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i)
    picked |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return picked;
#else
  return __byte_perm(low, high, selector);
#endif
}

// (bits & kMask) ^ kOther in one instruction, which the compiler makes two of.
template <uint32_t kMask, uint32_t kOther>
__device__ __forceinline__ uint32_t mask_and_flip(uint32_t bits) {
#if defined(ADAPTIVE_K_SIMT)
  return (bits & kMask) ^ kOther;
#else
  uint32_t to;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(to) : "r"(bits), "n"(kMask), "n"(kOther));
  return to;
#endif
}

// The differences of two pairs of 16-bit numbers, in one instruction.
template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t from, uint32_t what) {
#if defined(ADAPTIVE_K_SIMT)
  float a[2], b[2];
  unpack_pair<T>(from, a);
  unpack_pair<T>(what, b);
  return from_float<T>(a[0] - b[0]).bits | static_cast<uint32_t>(from_float<T>(a[1] - b[1]).bits)
                                               << 16;
#else
  if constexpr (T::kIsBFloat16) {
    return bit_copy<uint32_t>(
        __hsub2(bit_copy<__nv_bfloat162>(from), bit_copy<__nv_bfloat162>(what)));
  } else {
    return bit_copy<uint32_t>(__hsub2(bit_copy<__half2>(from), bit_copy<__half2>(what)));
  }
#endif
}

// How many values 16 bytes of T hold, and those values as floats.
template <typename T>
struct Vector16 {
  static constexpr int kSize = 8;
  __device__ __forceinline__ static void unpack(const uint4& v, float* to) {
    unpack_pair<T>(v.x, to);
    unpack_pair<T>(v.y, to + 2);
    unpack_pair<T>(v.z, to + 4);
    unpack_pair<T>(v.w, to + 6);
  }
};
template <>
struct Vector16<float> {
  static constexpr int kSize = 4;
  __device__ __forceinline__ static void unpack(const uint4& v, float* to) {
    to[0] = bit_copy<float>(v.x);
    to[1] = bit_copy<float>(v.y);
    to[2] = bit_copy<float>(v.z);
    to[3] = bit_copy<float>(v.w);
  }
};

// Packs the floats that 16 bytes of T hold.
__device__ __forceinline__ uint4 pack_floats(const float* from, float) {
  return {bit_copy<uint32_t>(from[0]), bit_copy<uint32_t>(from[1]), bit_copy<uint32_t>(from[2]),
          bit_copy<uint32_t>(from[3])};
}
template <typename T>
__device__ __forceinline__ uint4 pack_floats(const float* from, T) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = from_float<T>(from[2 * i]).bits |
               static_cast<uint32_t>(from_float<T>(from[2 * i + 1]).bits) << 16;
  return {words[0], words[1], words[2], words[3]};
}

inline int element_bytes(ElementType element) { return element == ElementType::kFloat32 ? 4 : 2; }

// Calls body(T()) with the C++ type of an element.
template <typename Body>
auto with_element(ElementType element, const Body& body) {
  switch (element) {
    case ElementType::kBFloat16:
      return body(BFloat16());
    case ElementType::kFloat32:
      return body(float());
    default:
      return body(Half());
  }
}

}  // namespace adaptive_k::cuda
