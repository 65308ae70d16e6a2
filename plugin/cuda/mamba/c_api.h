// SPDX-License-Identifier: Apache-2.0
// The C interface of Mamba2's launcher; moe/c_api.h says how.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/mamba/launcher.h"
#include "operator/table.h"

extern "C" {

struct AdaptiveKMambaLayer {
  int64_t tokens;
  int32_t sequences, slots, heads, head_dim, state_size, taps, element;
  double attributes[adaptive_k::kNumAttributes<adaptive_k::Mamba>];
};

struct AdaptiveKMambaPointers {
  const void* inputs[adaptive_k::kNumInputs<adaptive_k::Mamba>];
  void *y, *present_conv_state, *present_ssm_state;
};

ADAPTIVE_K_CUDA_API const char* adaptive_k_cuda_mamba_check(const AdaptiveKMambaLayer* layer);
ADAPTIVE_K_CUDA_API size_t adaptive_k_cuda_mamba_workspace_size(const AdaptiveKMambaLayer* layer);
// Returns a cudaError_t.
ADAPTIVE_K_CUDA_API int adaptive_k_cuda_mamba_launch(const AdaptiveKMambaLayer* layer,
                                                     const AdaptiveKMambaPointers* pointers,
                                                     void* workspace, void* stream);
}
