// SPDX-License-Identifier: Apache-2.0
// The Mamba2 operator: its attributes, and the arithmetic of one token that every binding shares.
//
// For each sequence, token by token (C channels, K taps, h a head, g = h / (heads / n_groups) its
// group, N the state's size, P the head's width):
//
//     x | B | C = silu(conv_bias + sum over k of conv_weight[k] * input[t - K + 1 + k])
//     dt        = clamp(softplus(dt[h] + dt_bias[h]), dt_min, dt_max)
//     S[h]      = exp(dt A[h]) S[h] + dt B[g] x[h]^T        [N, P]
//     y[h]      = C[g]^T S[h] + D[h] x[h]
//
// Source: Dao and Gu, "Transformers are SSMs" (2024), the recurrent form.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "operator/host_device.h"

namespace adaptive_k {

// The longest convolution.
constexpr int32_t kMambaMaxTaps = 16;
// The largest state of a head on a GPU.
constexpr int32_t kMaxStateSizeOnGpu = 256;

// In place of a slot: the sequence has no states. Its outputs are zeros and no state changes.
constexpr int32_t kNoSlot = -1;

struct MambaParams {
  int32_t n_groups = 1;
  float dt_min = 0.0f;
  float dt_max = std::numeric_limits<float>::infinity();
};

// Why no Mamba2 with these attributes exists, or nullptr when one does.
ADAPTIVE_K_HD const char* check_attributes(const MambaParams& params, int64_t heads) {
  if (params.n_groups < 1 || heads % params.n_groups != 0)
    return "n_groups must be at least 1 and divide the heads";
  if (!(params.dt_min >= 0) || !(params.dt_max >= params.dt_min))
    return "dt_min and dt_max must rise from 0";
  return nullptr;
}

// What a head does with one token: how much it takes in, and the logarithm of how much it keeps.
template <typename Real>
struct MambaStep {
  Real dt;
  Real log_decay;  // dt A
};

// On CPUs in double, because the error of the decay repeats with every token that the state
// survives; on GPUs in float, since 16-bit step sizes say no more.
template <typename Real>
ADAPTIVE_K_HD MambaStep<Real> mamba_step(const MambaParams& params, float dt, float dt_bias,
                                         float a) {
  using std::exp;
  using std::log1p;
  const Real z = static_cast<Real>(dt) + static_cast<Real>(dt_bias);
  Real step = z > 0 ? z + log1p(exp(-z)) : log1p(exp(z));
  step = step < params.dt_min ? static_cast<Real>(params.dt_min) : step;
  step = step > params.dt_max ? static_cast<Real>(params.dt_max) : step;
  return {step, step * static_cast<Real>(a)};
}

}  // namespace adaptive_k
