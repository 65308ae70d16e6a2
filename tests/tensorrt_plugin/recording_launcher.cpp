// SPDX-License-Identifier: Apache-2.0
// Stands in for the kernels where a test asks what the plugin hands them: it keeps what it was
// given and answers as it was told.
#include <stdexcept>

#include "cuda/mamba/launcher.h"
#include "cuda/moe/launcher.h"
#include "operator/table.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

adaptive_k::MoeParams g_params;
adaptive_k::cuda::MoeShape g_shape;
adaptive_k::cuda::MoeArguments g_arguments;
adaptive_k::MambaParams g_mamba_params;
adaptive_k::cuda::MambaShape g_mamba_shape;
adaptive_k::cuda::MambaArguments g_mamba;
void* g_workspace;
void* g_stream;
int g_launches;

const char* g_refusal;
int g_status;
int g_throw;  // 1: an exception, 2: something that is none

void maybe_throw() {
  if (g_throw == 1) throw std::runtime_error("the launcher threw");
  if (g_throw == 2) throw 7;
}

}  // namespace

EXPORT void recorder_answer(const char* refusal, int status, int throws) {
  g_refusal = refusal;
  g_status = status;
  g_throw = throws;
}

EXPORT int recorder_launches() { return g_launches; }

// In the order of plugin_harness.py's Recorded.
EXPORT void recorder_read(int64_t* numbers, float* routed_scaling_factor, void** pointers) {
  const auto& s = g_shape;
  const auto& p = g_params;
  const int64_t n[] = {s.tokens,
                       s.hidden,
                       s.intermediate,
                       s.experts,
                       s.policies,
                       s.choices,
                       static_cast<int64_t>(s.element),
                       s.group_size,
                       static_cast<int64_t>(p.activation),
                       static_cast<int64_t>(p.scoring),
                       p.norm_topk_prob,
                       p.n_group,
                       p.topk_group,
                       p.max_k,
                       static_cast<int64_t>(p.weight_format)};
  for (size_t i = 0; i < sizeof(n) / sizeof(n[0]); ++i) numbers[i] = n[i];
  *routed_scaling_factor = p.routed_scaling_factor;
  const auto& a = g_arguments;
  for (int32_t i = 0; i < adaptive_k::kNumInputs<adaptive_k::Moe>; ++i)
    *pointers++ = const_cast<void*>(a.inputs.at[i]);
  void* all[] = {a.output, a.k, a.entropy, a.expert_load, g_workspace, g_stream};
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i) pointers[i] = all[i];
}

// The same for Mamba2.
EXPORT void recorder_read_mamba(int64_t* numbers, float* limits, void** pointers) {
  const auto& s = g_mamba_shape;
  const int64_t n[] = {s.tokens,
                       s.sequences,
                       s.slots,
                       s.heads,
                       s.head_dim,
                       s.state_size,
                       s.taps,
                       static_cast<int64_t>(s.element),
                       g_mamba_params.n_groups};
  for (size_t i = 0; i < sizeof(n) / sizeof(n[0]); ++i) numbers[i] = n[i];
  limits[0] = g_mamba_params.dt_min;
  limits[1] = g_mamba_params.dt_max;
  const auto& a = g_mamba;
  for (int32_t i = 0; i < adaptive_k::kNumInputs<adaptive_k::Mamba>; ++i)
    *pointers++ = const_cast<void*>(a.inputs.at[i]);
  void* all[] = {a.y, a.present_conv_state, a.present_ssm_state, g_workspace, g_stream};
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); ++i) pointers[i] = all[i];
}

namespace adaptive_k::cuda {

const char* check(const MambaParams& params, const MambaShape& shape) {
  maybe_throw();
  g_mamba_params = params;
  g_mamba_shape = shape;
  return g_refusal;
}

size_t workspace_size(const MambaParams&, const MambaShape& shape) {
  g_mamba_shape = shape;
  return 2000 + static_cast<size_t>(shape.tokens);
}

cudaError_t launch(const MambaParams& params, const MambaShape& shape,
                   const MambaArguments& arguments, void* workspace, cudaStream_t stream) {
  maybe_throw();
  ++g_launches;
  g_mamba_params = params;
  g_mamba_shape = shape;
  g_mamba = arguments;
  g_workspace = workspace;
  g_stream = stream;
  return static_cast<cudaError_t>(g_status);
}

const char* check(const MoeParams& params, const MoeShape& shape) {
  maybe_throw();
  g_params = params;
  g_shape = shape;
  return g_refusal;
}

size_t workspace_size(const MoeParams&, const MoeShape& shape) {
  g_shape = shape;
  return 1000 + static_cast<size_t>(shape.tokens);
}

cudaError_t launch(const MoeParams& params, const MoeShape& shape, const MoeArguments& arguments,
                   void* workspace, cudaStream_t stream) {
  maybe_throw();
  ++g_launches;
  g_params = params;
  g_shape = shape;
  g_arguments = arguments;
  g_workspace = workspace;
  g_stream = stream;
  return static_cast<cudaError_t>(g_status);
}

}  // namespace adaptive_k::cuda
