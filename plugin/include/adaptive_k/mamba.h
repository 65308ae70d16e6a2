// SPDX-License-Identifier: Apache-2.0
// The Mamba2 operator: its attributes, and the arithmetic of one token that every face of it
// shares.
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

#include "adaptive_k/params.h"

namespace adaptive_k {

struct MambaParams {
  int32_t n_groups = 1;
  float dt_min = 0.0f;
  float dt_max = std::numeric_limits<float>::infinity();
};

// What a head does with one token: how much it forgets and how much it takes in.
struct MambaStep {
  float decay;  // exp(dt A)
  float dt;
};

// In double, because the error of the decay repeats with every token that the state survives.
ADAPTIVE_K_HD MambaStep mamba_step(const MambaParams& params, float dt, float dt_bias, float a) {
  const double z = static_cast<double>(dt) + dt_bias;
  double step = z > 0 ? z + log1p(exp(-z)) : log1p(exp(z));
  step = step < params.dt_min ? params.dt_min : step;
  step = step > params.dt_max ? params.dt_max : step;
  return {static_cast<float>(exp(step * a)), static_cast<float>(step)};
}

}  // namespace adaptive_k
