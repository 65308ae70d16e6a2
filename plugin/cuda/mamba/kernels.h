// SPDX-License-Identifier: Apache-2.0
// Mamba2's kernels, and what they share: where a sequence's tokens and states are.
#pragma once

#include "cuda/device.h"
#include "cuda/mamba/launcher.h"
#include "cuda/numeric.h"

namespace adaptive_k::cuda {

// Sequences of up to this many tokens are taken token by token, longer ones in chunks: a chunk
// costs about as much as that many updates of the state.
constexpr int32_t kRecurrentTokens = 4;

// What all kernels get. The states are updated in place.
struct MambaLayer {
  MambaParams params;
  const int32_t* begins;
  const int32_t* past_lens;
  const int32_t* slots;
  int32_t tokens, sequences, num_slots;
  int32_t heads, head_dim, state_size, taps;
  int32_t channels;
  const void* conv_input;
  const void* dt;
  const float *conv_weight, *conv_bias, *a, *d, *dt_bias;
  void* conv_state;
  float* ssm_state;
  void* mixed;  // [T, channels] element type: what the convolution makes of its input
  void* y;
};

struct MambaSequence {
  int32_t begin, length;
  int32_t slot;  // kNoSlot for none
  bool fresh;    // starts from zero states
};

// Sequence i, with whatever stands in the arrays confined to the memory that there is.
__device__ __forceinline__ MambaSequence sequence_at(const MambaLayer& layer, int32_t i) {
  const auto confined = [&](int32_t token) {
    return token < 0 ? 0 : token < layer.tokens ? token : layer.tokens;
  };
  const int32_t begin = confined(layer.begins[i]), end = confined(layer.begins[i + 1]);
  const int32_t slot = layer.slots[i];
  return {begin, end > begin ? end - begin : 0,
          slot >= 0 && slot < layer.num_slots ? slot : kNoSlot, layer.past_lens[i] <= 0};
}

// B and C of a head's group lie behind x; this is B's first channel, C's is n_groups * N later.
__device__ __forceinline__ int32_t group_channel(const MambaLayer& layer, int32_t head) {
  const int32_t group = head / (layer.heads / layer.params.n_groups);
  return layer.heads * layer.head_dim + (fault(kFaultMambaGroup) ? 0 : group) * layer.state_size;
}

// mixed, and the inputs that the convolution state keeps.
cudaError_t mamba_convolve(ElementType element, const MambaLayer& layer, cudaStream_t stream);

// y and states of the sequences of up to `most` tokens, token by token.
cudaError_t mamba_recur(ElementType element, const MambaLayer& layer, int32_t most,
                        cudaStream_t stream);

// y and states of the longer ones, in chunks on the tensor cores. float16 and bfloat16 only.
cudaError_t mamba_scan_chunks(ElementType element, const MambaLayer& layer, cudaStream_t stream);

}  // namespace adaptive_k::cuda
