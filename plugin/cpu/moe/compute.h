// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe on a CPU, over plain pointers. Runs in the TBB arena of the calling thread and has
// no threads of its own. Safe to call from several threads at once.
//
// A token's output does not depend, to the bit, on the other tokens of the call, on their number
// or on the number of threads (see kernels/kernels.h).
#pragma once

#include <cstdint>

#include "operator/moe/params.h"

namespace adaptive_k::cpu {

// All arrays are row-major and contiguous. Sizes as in the operator's description.
struct RoutingArguments {
  int64_t tokens = 0;
  int32_t experts = 0;
  int32_t policies = 0;
  int32_t choices = 0;
  const float* router_logits = nullptr;    // [T, E]
  const int32_t* policy_index = nullptr;   // [T], clamped into [0, P)
  const int32_t* policy_kind = nullptr;    // [P]
  const float* thresholds = nullptr;       // [P, C - 1]
  const int32_t* k_values = nullptr;       // [P, C]
  const float* correction_bias = nullptr;  // [E] or null
  const float* expert_norms = nullptr;     // [E] or null, which is as all ones
  // [E] or null: moe() adds to it the tokens that each expert runs for, modulo 2^32.
  uint32_t* expert_load = nullptr;
};

struct ExpertArguments {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  const float* hidden_states = nullptr;  // [T, H]
  const void* up = nullptr;              // [E, 2I, H] gated, else [E, I, H]; in the weight format
  const void* down = nullptr;            // [E, H, I]
  // Of quantised weights [E, 2I or I, H / group_size] and [E, H, I / group_size]; a group_size of 0
  // is the whole row.
  const float* up_scales = nullptr;
  const float* down_scales = nullptr;
  int64_t group_size = 0;
};

// Selects each token's experts. experts and weights are [T, largest_k(params, E)]: the first k[t]
// of a row, best first, then -1 and 0.
void route(const MoeParams& params, const RoutingArguments& routing, int32_t* k, float* entropy,
           int32_t* experts, float* weights);

// The whole operator: output [T, H], k [T], entropy [T].
void moe(const MoeParams& params, const RoutingArguments& routing, const ExpertArguments& experts,
         float* output, int32_t* k, float* entropy);

}  // namespace adaptive_k::cpu
