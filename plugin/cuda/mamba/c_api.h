// SPDX-License-Identifier: Apache-2.0
// Mamba2's launcher for callers without C++, as moe/c_api.h is AdaptiveKMoe's.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/mamba/launcher.h"

extern "C" {

struct AdaptiveKMambaLayer {
  int64_t tokens;
  int32_t sequences, slots, heads, head_dim, state_size, taps, element, n_groups;
  float dt_min, dt_max;
};

struct AdaptiveKMambaPointers {
  const void *conv_input, *dt, *subsequence_begins, *past_lens, *state_slots, *conv_weight;
  const void *conv_bias, *a, *d, *dt_bias, *conv_state, *ssm_state;
  void *y, *present_conv_state, *present_ssm_state;
};

ADAPTIVE_K_CUDA_API const char* adaptive_k_cuda_mamba_check(const AdaptiveKMambaLayer* layer);
ADAPTIVE_K_CUDA_API size_t adaptive_k_cuda_mamba_workspace_size(const AdaptiveKMambaLayer* layer);
// Returns a cudaError_t.
ADAPTIVE_K_CUDA_API int adaptive_k_cuda_mamba_launch(const AdaptiveKMambaLayer* layer,
                                                     const AdaptiveKMambaPointers* pointers,
                                                     void* workspace, void* stream);
}
