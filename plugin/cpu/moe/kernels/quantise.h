// SPDX-License-Identifier: Apache-2.0
// How activations become int8 (ActivationFormat::kInt8): a row is taken in blocks of neighbours,
// and a block's values are round(x * 127 / largest), to nearest, ties to even, with the scale
// largest / 127. Every instruction set rounds to the same integers. In an unnamed namespace, as
// impl.h is.
#pragma once

#include <cstdint>
#include <cstring>

namespace adaptive_k::cpu {
namespace {

// A block whose largest is below this counts as zeros: 127 / largest would overflow.
constexpr float kLeastActivation = 1e-35f;

// One block of `count` values: integers, their scale and their sum. A block with a value that is
// not finite has the scale NaN.
inline void quantise(const float* x, int count, int8_t* values, float* scale, int32_t* sum) {
  uint32_t largest_bits = 0;  // ordered as the numbers are, NaN last
  for (int k = 0; k < count; ++k) {
    uint32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffffu;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (largest_bits >= 0x7f800000u || largest < kLeastActivation) {
    *scale = largest_bits >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
    *sum = 0;
    std::memset(values, 0, count);
    return;
  }
  *scale = largest / 127.0f;
  const float factor = 127.0f / largest;
  // Adding this rounds to nearest, ties to even: the sum's last bit counts one.
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  int32_t total = 0;
  for (int k = 0; k < count; ++k) {
    const float shifted = x[k] * factor + kShift;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const int32_t value = bits - 0x4b400000;
    values[k] = static_cast<int8_t>(value);
    total += value;
  }
  *sum = total;
}

}  // namespace
}  // namespace adaptive_k::cpu
