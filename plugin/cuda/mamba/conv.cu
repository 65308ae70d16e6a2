// SPDX-License-Identifier: Apache-2.0
// The causal convolution behind its activation. A thread keeps 16 bytes of neighbouring channels of
// the last K - 1 tokens in registers and goes on through a tile of a sequence's tokens, so that
// every input is read about once. Whoever has a sequence's first tile is the only one that needs
// the state that came in, and leaves the one that goes out.
#include "cuda/mamba/kernels.h"
#include "operator/activation.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kThreads = 128;
// The first tile must hold every token that looks back beyond its sequence's tokens.
constexpr int kTile = 16;
static_assert(kTile >= kMambaMaxTaps - 1, "the state is read by the first tile alone");

// Tiles of all sequences: sequence i has room for its own from begins[i] / kTile + i on, which is
// enough for any lengths, and needs no list.
__device__ __forceinline__ int32_t tile_index(const MambaLayer& layer, int32_t sequence) {
  return layer.begins[sequence] / kTile + sequence;
}

__device__ __forceinline__ int32_t find_sequence(const MambaLayer& layer, int32_t tile) {
  int32_t low = 0, high = layer.sequences;  // tile_index(low) <= tile < tile_index(high)
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (tile_index(layer, middle) <= tile ? low : high) = middle;
  }
  return low;
}

// 16 bytes of T from a place that may hold none.
template <typename T>
__device__ __forceinline__ void load_row(const T* from, float* to) {
  constexpr int kSize = Vector16<T>::kSize;
  if (from != nullptr) {
    Vector16<T>::unpack(load_vector(from), to);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) to[i] = 0.0f;
  }
}

// kSize floats.
template <int kSize>
__device__ __forceinline__ void load_floats(const float* from, float* to) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) Vector16<float>::unpack(load_vector(from + i), to + i);
}

// kTaps taps, or any number when it is 0.
template <typename T, int kTaps>
__global__ void __launch_bounds__(kThreads, 4) mamba_convolve_kernel(MambaLayer layer) {
  constexpr int kSize = Vector16<T>::kSize;
  const int32_t tile = static_cast<int32_t>(blockIdx.x);
  const int32_t index = find_sequence(layer, tile);
  const MambaSequence sequence = sequence_at(layer, index);
  const int32_t first = (tile - tile_index(layer, index)) * kTile;
  const int32_t channel = static_cast<int32_t>(blockIdx.y * kThreads + threadIdx.x) * kSize;
  if (first < 0 || first >= sequence.length || channel >= layer.channels ||
      sequence.slot == kNoSlot)
    return;

  const int taps = kTaps > 0 ? kTaps : layer.taps;
  const int64_t channels = layer.channels;
  const T* input = static_cast<const T*>(layer.conv_input) + sequence.begin * channels + channel;
  T* state = static_cast<T*>(layer.conv_state) + sequence.slot * (taps - 1) * channels + channel;
  T* mixed = static_cast<T*>(layer.mixed) + sequence.begin * channels + channel;
  const bool fresh = sequence.fresh && !fault(kFaultMambaFreshConv);
  // The input of a token of this sequence, those before its first among them.
  const auto row = [&](int32_t token) -> const T* {
    if (token >= 0) return input + token * channels;
    return fresh ? nullptr : state + (token + taps - 1) * channels;
  };

  float bias[kSize];
  load_floats<kSize>(layer.conv_bias + channel, bias);
  const float* weight = layer.conv_weight + channel;
  constexpr int kKept = kTaps > 0 ? kTaps : 1;
  float weights[kKept][kSize], window[kKept][kSize];
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      load_floats<kSize>(weight + k * channels, weights[k]);
      if (k < kTaps - 1) load_row(row(first + k - kTaps + 1), window[k + 1]);
    }
  }
  const int32_t end = first + kTile < sequence.length ? first + kTile : sequence.length;
  for (int32_t token = first; token < end; ++token) {
    float sum[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = bias[i];
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int k = 0; k + 1 < kTaps; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) window[k][i] = window[k + 1][i];
      }
      load_row(row(token), window[kTaps - 1]);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += weights[k][i] * window[k][i];
      }
    } else {
#pragma unroll 1  // the rounds have nothing to share, and more of them at once would spill
      for (int k = 0; k < taps; ++k) {
        load_floats<kSize>(weight + k * channels, weights[0]);
        load_row(row(token - taps + 1 + k), window[0]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += weights[0][i] * window[0][i];
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = silu(sum[i]);
    store_vector(mixed + token * channels, pack_floats(sum, T()));
  }

  if (first > 0) return;
  // In rising order: a row that is still to be read lies further on.
  for (int i = 0; i < taps - 1; ++i) {
    const int k = fault(kFaultMambaConvOrder) ? taps - 2 - i : i;
    const T* from = row(sequence.length - taps + 1 + k);
    const uint4 kept = from == nullptr ? uint4{0, 0, 0, 0} : load_vector(from);
    store_vector(state + k * channels, kept);
  }
}

}  // namespace

cudaError_t mamba_convolve(ElementType element, const MambaLayer& layer, cudaStream_t stream) {
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    const dim3 grid(
        static_cast<unsigned>(layer.tokens / kTile + layer.sequences),
        static_cast<unsigned>(divide_up(layer.channels, kThreads * Vector16<T>::kSize)));
    if (layer.taps == 4)
      return ADAPTIVE_K_LAUNCH((mamba_convolve_kernel<T, 4>), grid, dim3(kThreads), 0, stream,
                               layer);
    return ADAPTIVE_K_LAUNCH((mamba_convolve_kernel<T, 0>), grid, dim3(kThreads), 0, stream, layer);
  });
}

}  // namespace adaptive_k::cuda
