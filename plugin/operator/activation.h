// SPDX-License-Identifier: Apache-2.0
// The activation functions, for host and device. On the host they are plain arithmetic without
// branches or calls (gelu by erf aside), so that a compiler turns a loop over them into SIMD code
// whose every lane computes the same bits as a single call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "operator/moe/params.h"

namespace adaptive_k {

// e^x within 2 units in the last place. Saturates at both ends of the range of float instead of
// reaching 0 or infinity; NaN stays NaN.
ADAPTIVE_K_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds x / ln 2 to the integer n that then sits in the low mantissa bits.
  constexpr float kRounder = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRounder;
  const float n = shifted - kRounder;
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.3888889e-3f;  // Taylor to r^6; |r| <= ln 2 / 2
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  p = p + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int32_t power = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float scale;  // 2^n
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
#endif
}

ADAPTIVE_K_HD float silu(float x) { return x / (1.0f + exponential(-x)); }

ADAPTIVE_K_HD float gelu_erf(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.707106781186547524f));
}

// 0.5 (1 + tanh z) is the logistic function at 2 z.
ADAPTIVE_K_HD float gelu_tanh(float x) {
  const float z = 0.797884560802865356f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * z));
}

// NaN stays NaN, as in PyTorch.
ADAPTIVE_K_HD float relu(float x) { return x < 0.0f ? 0.0f : x; }

// The hidden value of an expert's neuron. gate is read by the gated activations only.
template <Activation kind>
ADAPTIVE_K_HD float activate(float gate, float up) {
  switch (kind) {
    case Activation::kSwiglu:
      return silu(gate) * up;
    case Activation::kGeglu:
      return gelu_erf(gate) * up;
    case Activation::kSilu:
      return silu(up);
    case Activation::kGelu:
      return gelu_erf(up);
    case Activation::kGeluTanh:
      return gelu_tanh(up);
    case Activation::kRelu:
      return relu(up);
    case Activation::kRelu2:
      return relu(up) * relu(up);
  }
  return up;
}

}  // namespace adaptive_k
