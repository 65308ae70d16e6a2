// SPDX-License-Identifier: Apache-2.0
// The launcher for callers without C++ (tests and benchmarks through ctypes). Structures are plain
// and fixed; enumerations travel as their numbers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/moe/launcher.h"

extern "C" {

struct AdaptiveKLayer {
  int64_t tokens;
  int32_t hidden, intermediate, experts, policies, choices;
  int32_t element, weights, group_size, path;
  int32_t activation, scoring, norm_topk_prob, n_group, topk_group, max_k;
  float routed_scaling_factor;
};

struct AdaptiveKPointers {
  const void *hidden_states, *router_logits, *policy_index, *policy_kind, *thresholds, *k_values;
  const void *up, *down, *up_scales, *down_scales, *correction_bias, *expert_norms;
  void *output, *k, *entropy;
};

// Null, or the sentence that says why such a layer cannot run.
ADAPTIVE_K_CUDA_API const char* adaptive_k_cuda_check(const AdaptiveKLayer* layer);
ADAPTIVE_K_CUDA_API size_t adaptive_k_cuda_workspace_size(const AdaptiveKLayer* layer);
// Returns a cudaError_t.
ADAPTIVE_K_CUDA_API int adaptive_k_cuda_launch(const AdaptiveKLayer* layer,
                                               const AdaptiveKPointers* pointers, void* workspace,
                                               void* stream);
// For tests: 1 when a launch of this layer decodes, 2 when it prefills.
ADAPTIVE_K_CUDA_API int adaptive_k_cuda_path(const AdaptiveKLayer* layer);
// For tests: where in the workspace launch() leaves experts, weights, offsets, active, num_active,
// row_token or token_rows; -1 for other names.
ADAPTIVE_K_CUDA_API int64_t adaptive_k_cuda_workspace_offset(const AdaptiveKLayer* layer,
                                                             const char* name);
}
