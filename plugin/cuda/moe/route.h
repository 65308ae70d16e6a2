// SPDX-License-Identifier: Apache-2.0
// Routing: from each token's logits and policy to its k, its experts and their weights.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

struct RouteArguments {
  MoeParams params;
  int64_t tokens;
  int32_t num_experts, num_policies, num_choices;
  int32_t capacity;  // largest_k()
  const float* logits;
  const int32_t* policy_index;
  const int32_t* policy_kind;
  const float* thresholds;
  const int32_t* k_values;
  const float* correction_bias;  // or null
  const float* expert_norms;     // or null
  int32_t* k;                    // [T]
  float* entropy;                // [T]
  int32_t* experts;              // [T, capacity], best first, -1 after the first k
  float* weights;                // [T, capacity], 0 after the first k
  uint8_t* read;                 // [E] scratch: which experts a step with sharing tokens reads
};

// Each token as if it were alone; or, `again`, only those that take part in sharing, among the
// experts that are marked in `read` (see operator/moe/sharing.h).
cudaError_t route(const RouteArguments& arguments, bool again, cudaStream_t stream);

}  // namespace adaptive_k::cuda
