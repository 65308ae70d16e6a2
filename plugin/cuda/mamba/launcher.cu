// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "cuda/mamba/kernels.h"
#include "cuda/mamba/launcher.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kThreads = 256;

// Four pieces of 16 bytes a thread.
constexpr int kPieces = 4;

__global__ void __launch_bounds__(kThreads)
    copy_states(const unsigned char* from, unsigned char* to, int64_t pieces) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPieces + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int64_t piece = first + i * kThreads;
    if (piece < pieces) store_vector(to + 16 * piece, load_vector(from + 16 * piece));
  }
}

cudaError_t copy_unless_same(const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  const int64_t pieces = bytes / 16;
  if (from == to || pieces == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(divide_up(pieces, kThreads * kPieces)));
  return ADAPTIVE_K_LAUNCH(copy_states, grid, dim3(kThreads), 0, stream,
                           static_cast<const unsigned char*>(from), static_cast<unsigned char*>(to),
                           pieces);
}

}  // namespace

const char* check(const MambaParams& params, const MambaShape& s) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (s.heads < 1 || s.head_dim < 1 || s.state_size < 1)
    return "heads, head_dim and state_size must be positive";
  if (const char* wrong = check_attributes(params, s.heads)) return wrong;
  if (s.heads > kMaxHeads) return "there may be at most 65535 heads";
  if (s.head_dim % 8 != 0 || s.state_size % 8 != 0)
    return "head_dim and state_size must be multiples of 8, for 16-byte loads";
  if (s.state_size > kMaxStateSizeOnGpu) return "state_size must be at most 256 on CUDA devices";
  if (s.taps < 2 || s.taps > kMambaMaxTaps) return "the convolution must have 2 to 16 taps";
  if (s.element < ElementType::kFloat16 || s.element > ElementType::kFloat32)
    return "the element type is unknown";
  if (mamba_channels(params, s) > kMost) return "the channels must stay below 2^31";
  if (s.tokens < 0 || s.sequences < 0 || s.slots < 0)
    return "the numbers of tokens, sequences and slots must not be negative";
  if (s.tokens > kMost) return "the number of tokens must stay below 2^31";
  return nullptr;
}

size_t workspace_size(const MambaParams& params, const MambaShape& s) {
  const int64_t bytes = s.tokens * mamba_channels(params, s) * element_bytes(s.element);
  return static_cast<size_t>(divide_up(bytes, 256) * 256);
}

cudaError_t launch(const MambaParams& params, const MambaShape& s, const MambaArguments& a,
                   void* workspace, cudaStream_t stream) {
  if (check(params, s) != nullptr) return cudaErrorInvalidValue;
  const int64_t channels = mamba_channels(params, s);
  const int64_t conv_bytes = s.slots * (s.taps - 1) * channels * element_bytes(s.element);
  const int64_t ssm_bytes = int64_t{s.slots} * s.heads * s.state_size * s.head_dim * 4;
  const void* const conv_state = a.inputs[MambaInput::kConvState];
  const void* const ssm_state = a.inputs[MambaInput::kSsmState];
  if (s.slots > 0 && (conv_state == nullptr || ssm_state == nullptr ||
                      a.present_conv_state == nullptr || a.present_ssm_state == nullptr))
    return cudaErrorInvalidValue;
  ADAPTIVE_K_RETURN_IF(copy_unless_same(conv_state, a.present_conv_state, conv_bytes, stream));
  ADAPTIVE_K_RETURN_IF(copy_unless_same(ssm_state, a.present_ssm_state, ssm_bytes, stream));
  if (s.tokens == 0 || s.sequences == 0) return cudaSuccess;
  for (int32_t i = 0; i < static_cast<int32_t>(MambaInput::kConvState); ++i)
    if (a.inputs.at[i] == nullptr) return cudaErrorInvalidValue;
  if (a.y == nullptr || workspace == nullptr) return cudaErrorInvalidValue;

  MambaLayer layer = {};
  layer.params = params;
  layer.begins = a.inputs.integers(MambaInput::kSubsequenceBegins);
  layer.past_lens = a.inputs.integers(MambaInput::kPastLens);
  layer.slots = a.inputs.integers(MambaInput::kStateSlots);
  layer.tokens = static_cast<int32_t>(s.tokens);
  layer.sequences = s.sequences;
  layer.num_slots = s.slots;
  layer.heads = s.heads;
  layer.head_dim = s.head_dim;
  layer.state_size = s.state_size;
  layer.taps = s.taps;
  layer.channels = static_cast<int32_t>(channels);
  layer.conv_input = a.inputs[MambaInput::kConvInput];
  layer.dt = a.inputs[MambaInput::kDt];
  layer.conv_weight = a.inputs.floats(MambaInput::kConvWeight);
  layer.conv_bias = a.inputs.floats(MambaInput::kConvBias);
  layer.a = a.inputs.floats(MambaInput::kA);
  layer.d = a.inputs.floats(MambaInput::kD);
  layer.dt_bias = a.inputs.floats(MambaInput::kDtBias);
  layer.conv_state = a.present_conv_state;
  layer.ssm_state = a.present_ssm_state;
  layer.mixed = workspace;
  layer.y = a.y;

  ADAPTIVE_K_RETURN_IF(mamba_convolve(s.element, layer, stream));
  // A decode step has no long sequence, which the host knows by the numbers alone. float32, which
  // is for tests, has no tensor cores to go to.
  const bool recurs =
      s.tokens <= s.sequences || s.tokens <= kRecurrentTokens || s.element == ElementType::kFloat32;
  const int32_t most = recurs ? std::numeric_limits<int32_t>::max() : kRecurrentTokens;
  ADAPTIVE_K_RETURN_IF(mamba_recur(s.element, layer, most, stream));
  return recurs ? cudaSuccess : mamba_scan_chunks(s.element, layer, stream);
}

}  // namespace adaptive_k::cuda
