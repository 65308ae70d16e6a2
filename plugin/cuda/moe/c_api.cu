// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "cuda/moe/c_api.h"
#include "cuda/moe/workspace.h"

namespace {

using namespace adaptive_k;        // NOLINT
using namespace adaptive_k::cuda;  // NOLINT

MoeParams params_of(const AdaptiveKLayer& layer) {
  MoeParams params;
  for (int32_t i = 0; i < kNumAttributes<Moe>; ++i)
    Moe::kAttributes[i].set(&params, layer.attributes[i]);
  return params;
}

MoeShape shape_of(const AdaptiveKLayer& layer) {
  MoeShape shape;
  shape.tokens = layer.tokens;
  shape.hidden = layer.hidden;
  shape.intermediate = layer.intermediate;
  shape.experts = layer.experts;
  shape.policies = layer.policies;
  shape.choices = layer.choices;
  shape.element = static_cast<ElementType>(layer.element);
  shape.group_size = layer.group_size;
  shape.path = static_cast<Path>(layer.path);
  shape.local_experts = layer.local_experts;
  return shape;
}

}  // namespace

const char* adaptive_k_cuda_check(const AdaptiveKLayer* layer) {
  return check(params_of(*layer), shape_of(*layer));
}

size_t adaptive_k_cuda_workspace_size(const AdaptiveKLayer* layer) {
  return workspace_size(params_of(*layer), shape_of(*layer));
}

int adaptive_k_cuda_launch(const AdaptiveKLayer* layer, const AdaptiveKPointers* p, void* workspace,
                           void* stream) {
  MoeArguments a;
  for (int32_t i = 0; i < kNumInputs<Moe>; ++i) a.inputs.at[i] = p->inputs[i];
  a.output = p->output;
  a.k = static_cast<int32_t*>(p->k);
  a.entropy = static_cast<float*>(p->entropy);
  a.expert_load = static_cast<int32_t*>(p->expert_load);
  return static_cast<int>(
      launch(params_of(*layer), shape_of(*layer), a, workspace, static_cast<cudaStream_t>(stream)));
}

int adaptive_k_cuda_path(const AdaptiveKLayer* layer) {
  return static_cast<int>(choose_path(params_of(*layer), shape_of(*layer)));
}

int64_t adaptive_k_cuda_workspace_offset(const AdaptiveKLayer* layer, const char* name) {
  const MoeParams params = params_of(*layer);
  const MoeShape shape = shape_of(*layer);
  const Workspace w = lay_out(params, shape, choose_path(params, shape));
  const struct {
    const char* name;
    size_t at;
  } parts[] = {{"experts", w.experts},       {"weights", w.weights},
               {"offsets", w.offsets},       {"active", w.active},
               {"num_active", w.num_active}, {"row_token", w.row_token},
               {"token_rows", w.token_rows}};
  for (const auto& part : parts)
    if (std::strcmp(part.name, name) == 0) return static_cast<int64_t>(part.at);
  return -1;
}
