// SPDX-License-Identifier: Apache-2.0
// Mamba2 on a CPU, over plain pointers: the causal convolution, then the scan, for sequences packed
// one after another, whose states lie in slots and are updated in place. Runs in the TBB arena of
// the calling thread. Safe to call from several threads at once on different slots.
//
// The scan is the recurrence itself, token by token, and every number of a token is computed by the
// same instructions in the same order wherever it stands. So a token's output has the same bits
// alone and in any batch, and however its prompt was cut into steps.
#pragma once

#include <cstdint>

#include "operator/mamba/params.h"
#include "operator/mamba/shapes.h"

namespace adaptive_k::cpu {

// All arrays are row-major and contiguous. conv_input is x, B and C side by side, as the model's
// projection makes them.
struct MambaArguments {
  MambaArguments(const MambaSizes& sizes, const Addresses<MambaInput>& inputs);

  MambaSizes sizes;
  const float* conv_input = nullptr;            // [T, channels]
  const float* dt = nullptr;                    // [T, heads], before its bias
  const int32_t* subsequence_begins = nullptr;  // [S + 1], from 0 to T
  const int32_t* past_lens = nullptr;           // [S]; at 0 a sequence starts from zero states
  const int32_t* state_slots = nullptr;         // [S], all different but for kNoSlot
  const float* conv_weight = nullptr;           // [K, channels], the newest token's tap last
  const float* conv_bias = nullptr;             // [channels]
  const float* a = nullptr;                     // [heads], below 0
  const float* d = nullptr;                     // [heads]
  const float* dt_bias = nullptr;               // [heads]
  float* conv_state = nullptr;                  // [slots, K - 1, channels], the newest token last
  float* ssm_state = nullptr;                   // [slots, heads, N, P]
};

// y [T, heads * head_dim]. Throws std::invalid_argument, with nothing changed, when
// subsequence_begins, past_lens or state_slots hold values that cannot be.
void mamba2(const MambaParams& params, const MambaArguments& args, float* y);

}  // namespace adaptive_k::cpu
