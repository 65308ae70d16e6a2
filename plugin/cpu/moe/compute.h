// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe on a CPU, over plain pointers. Runs in the TBB arena of the calling thread and has
// no threads of its own. Safe to call from several threads at once.
//
// A token's output does not depend, to the bit, on the other tokens of the call, on their number
// or on the number of threads (see kernels/kernels.h).
#pragma once

#include <cstdint>

#include "operator/moe/description.h"
#include "operator/moe/shapes.h"

namespace adaptive_k::cpu {

// All arrays are row-major and contiguous, with types and shapes as in the operator's description;
// element and scale types are float32.
struct MoeArguments {
  MoeSizes sizes;
  Addresses<MoeInput> inputs;
  // [E] or null: moe() adds to it the tokens that each expert runs for, modulo 2^32.
  uint32_t* expert_load = nullptr;
};

// Selects each token's experts. experts and weights are [T, largest_k(params, E)]: the first k[t]
// of a row, best first, then -1 and 0.
void route(const MoeParams& params, const MoeArguments& arguments, int32_t* k, float* entropy,
           int32_t* experts, float* weights);

// The whole operator: output [T, H], k [T], entropy [T].
void moe(const MoeParams& params, const MoeArguments& arguments, float* output, int32_t* k,
         float* entropy);

}  // namespace adaptive_k::cpu
