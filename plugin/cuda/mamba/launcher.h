// SPDX-License-Identifier: Apache-2.0
// Mamba2 on an NVIDIA GPU: the interface between the kernels and the bindings that call them.
// What moe/launcher.h says of launch() holds here too.
#pragma once

#include "cuda/interface.h"
#include "operator/mamba/description.h"

namespace adaptive_k::cuda {

// Everything that is known before the data is.
struct MambaShape {
  int64_t tokens = 0;     // T, over all sequences
  int32_t sequences = 0;  // S
  int32_t slots = 0;      // of the states
  int32_t heads = 0;
  int32_t head_dim = 0;    // P
  int32_t state_size = 0;  // N
  int32_t taps = 0;        // K
  ElementType element = ElementType::kFloat16;
};

// Of the convolution: x, B and C side by side.
inline int64_t mamba_channels(const MambaParams& params, const MambaShape& s) {
  return int64_t{s.heads} * s.head_dim + int64_t{2} * params.n_groups * s.state_size;
}

// Device pointers, row-major and contiguous, with types and shapes as in the operator's
// description; conv_input, conv_weight, conv_bias, the states and y are aligned to 16 bytes. The
// states go in and come out: where both pointers are the same, they are updated in place; where
// not, the states that no sequence has are copied too. A slot outside [0, slots), as kNoSlot is, is
// none.
struct MambaArguments {
  Addresses<MambaInput> inputs;
  void* y = nullptr;                   // [T, heads * P] element type
  void* present_conv_state = nullptr;  // as conv_state
  float* present_ssm_state = nullptr;  // as ssm_state
};

// A limit of this implementation.
constexpr int32_t kMaxHeads = 65535;

// As those of AdaptiveKMoe. With 0 tokens a launch only copies states that are not in place.
ADAPTIVE_K_CUDA_API const char* check(const MambaParams& params, const MambaShape& shape);
ADAPTIVE_K_CUDA_API size_t workspace_size(const MambaParams& params, const MambaShape& shape);
ADAPTIVE_K_CUDA_API cudaError_t launch(const MambaParams& params, const MambaShape& shape,
                                       const MambaArguments& arguments, void* workspace,
                                       cudaStream_t stream);

}  // namespace adaptive_k::cuda
