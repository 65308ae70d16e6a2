// SPDX-License-Identifier: Apache-2.0
#include "cuda/mamba/c_api.h"

namespace {

using namespace adaptive_k;        // NOLINT
using namespace adaptive_k::cuda;  // NOLINT

MambaParams params_of(const AdaptiveKMambaLayer& layer) {
  return {layer.n_groups, layer.dt_min, layer.dt_max};
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
  a.conv_input = p->conv_input;
  a.dt = p->dt;
  a.subsequence_begins = static_cast<const int32_t*>(p->subsequence_begins);
  a.past_lens = static_cast<const int32_t*>(p->past_lens);
  a.state_slots = static_cast<const int32_t*>(p->state_slots);
  a.conv_weight = static_cast<const float*>(p->conv_weight);
  a.conv_bias = static_cast<const float*>(p->conv_bias);
  a.a = static_cast<const float*>(p->a);
  a.d = static_cast<const float*>(p->d);
  a.dt_bias = static_cast<const float*>(p->dt_bias);
  a.conv_state = p->conv_state;
  a.ssm_state = static_cast<const float*>(p->ssm_state);
  a.y = p->y;
  a.present_conv_state = p->present_conv_state;
  a.present_ssm_state = static_cast<float*>(p->present_ssm_state);
  return static_cast<int>(
      launch(params_of(*layer), shape_of(*layer), a, workspace, static_cast<cudaStream_t>(stream)));
}
