// SPDX-License-Identifier: Apache-2.0
// The C interface of the library: AdaptiveKMoe's launcher for callers without C++ (the tests and
// benchmarks call it through ctypes). Attributes and inputs travel in the order of the operator's
// tables, words as their numbers; the Python package has the tables in plugin/description.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/moe/launcher.h"
#include "operator/table.h"

extern "C" {

struct AdaptiveKLayer {
  int64_t tokens;
  int32_t hidden, intermediate, experts, policies, choices, element, group_size, path,
      local_experts;
  double attributes[adaptive_k::kNumAttributes<adaptive_k::Moe>];
};

struct AdaptiveKPointers {
  const void* inputs[adaptive_k::kNumInputs<adaptive_k::Moe>];  // null where one is absent
  void *output, *k, *entropy, *expert_load;                     // the last may be null
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
// Where in the workspace launch() leaves experts and weights (of [T, largest_k()]; -1 and 0 after a
// token's own), offsets ([E + 1]: the rows of expert e begin at offsets[e], so that their
// difference is each expert's tokens) and, for tests, active, num_active, row_token or token_rows;
// -1 for other names.
ADAPTIVE_K_CUDA_API int64_t adaptive_k_cuda_workspace_offset(const AdaptiveKLayer* layer,
                                                             const char* name);
}
