// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe on an NVIDIA GPU: the interface between the kernels and the bindings that call them
// (TensorRT plugin, C interface).
//
// launch() never synchronises with the host, allocates nothing and reads nothing back, so that it
// can be captured in a CUDA graph. Its results repeat bit for bit.
#pragma once

#include "cuda/interface.h"
#include "operator/moe/description.h"

namespace adaptive_k::cuda {

// kDecode streams each chosen expert's weights once past a few tokens; kPrefill multiplies tiles of
// tokens on the tensor cores. kAuto takes one by the number of tokens. kRoute stops when the
// experts are chosen, which it leaves in the workspace; it reads no hidden states and no weights,
// and their sizes count for nothing.
enum class Path : int32_t { kAuto = 0, kDecode = 1, kPrefill = 2, kRoute = 3 };

// Everything that is known before the data is. T, H, I, E, P and C of the operator's description.
struct MoeShape {
  int64_t tokens = 0;
  int32_t hidden = 0;
  int32_t intermediate = 0;
  int32_t experts = 0;
  int32_t policies = 0;
  int32_t choices = 0;
  ElementType element = ElementType::kFloat16;
  int32_t group_size = 0;  // read when the weights are quantised
  Path path = Path::kAuto;
  int32_t local_experts = 0;  // whose weights are given; read with the attribute first_expert
};

// Device pointers, row-major and contiguous, with types and shapes as in the operator's
// description: scales are of the element type, quantised weights are bytes, plain ones of the
// element type. hidden_states, up, down and output are aligned to 16 bytes. correction_bias may be
// null, and so may expert_norms, which is as all ones, and thresholds where there is one choice.
struct MoeArguments {
  Addresses<MoeInput> inputs;
  void* output = nullptr;          // [T, H] element type
  int32_t* k = nullptr;            // [T]
  float* entropy = nullptr;        // [T]
  int32_t* expert_load = nullptr;  // [E] tokens that run each expert; null where nobody asks
};

// Returns nullptr when this implementation runs such a layer, else the sentence that says why not.
// The number of tokens may be 0; a binding that knows only its upper bound checks with that.
ADAPTIVE_K_CUDA_API const char* check(const MoeParams& params, const MoeShape& shape);

// Bytes of scratch memory that launch() needs; never falls when tokens grow, so that the size for
// the most tokens serves all calls. For a shape that check() accepts.
ADAPTIVE_K_CUDA_API size_t workspace_size(const MoeParams& params, const MoeShape& shape);

// Enqueues the layer on the stream. workspace is aligned to 256 bytes and needs no initialisation.
// Returns cudaErrorInvalidValue when check() refuses the shape or a needed pointer is null, else
// what the launches return. With 0 tokens it does nothing.
ADAPTIVE_K_CUDA_API cudaError_t launch(const MoeParams& params, const MoeShape& shape,
                                       const MoeArguments& arguments, void* workspace,
                                       cudaStream_t stream);

}  // namespace adaptive_k::cuda
