// SPDX-License-Identifier: Apache-2.0
#include "cuda/mamba/c_api.h"

namespace {

using namespace adaptive_k;        // NOLINT
using namespace adaptive_k::cuda;  // NOLINT

MambaParams params_of(const AdaptiveKMambaLayer& layer) {
  MambaParams params;
  for (int32_t i = 0; i < kNumAttributes<Mamba>; ++i)
    Mamba::kAttributes[i].set(&params, layer.attributes[i]);
  return params;
}

MambaShape shape_of(const AdaptiveKMambaLayer& layer) {
  MambaShape shape;
  shape.tokens = layer.tokens;
  shape.sequences = layer.sequences;
  shape.slots = layer.slots;
  shape.heads = layer.heads;
  shape.head_dim = layer.head_dim;
  shape.state_size = layer.state_size;
  shape.taps = layer.taps;
  shape.element = static_cast<ElementType>(layer.element);
  return shape;
}

}  // namespace

const char* adaptive_k_cuda_mamba_check(const AdaptiveKMambaLayer* layer) {
  return check(params_of(*layer), shape_of(*layer));
}

size_t adaptive_k_cuda_mamba_workspace_size(const AdaptiveKMambaLayer* layer) {
  return workspace_size(params_of(*layer), shape_of(*layer));
}

int adaptive_k_cuda_mamba_launch(const AdaptiveKMambaLayer* layer, const AdaptiveKMambaPointers* p,
                                 void* workspace, void* stream) {
  MambaArguments a;
  for (int32_t i = 0; i < kNumInputs<Mamba>; ++i) a.inputs.at[i] = p->inputs[i];
  a.y = p->y;
  a.present_conv_state = p->present_conv_state;
  a.present_ssm_state = static_cast<float*>(p->present_ssm_state);
  return static_cast<int>(
      launch(params_of(*layer), shape_of(*layer), a, workspace, static_cast<cudaStream_t>(stream)));
}
