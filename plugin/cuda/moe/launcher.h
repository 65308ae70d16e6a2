// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe on an NVIDIA GPU: the interface between the kernels and the faces that call them
// (TensorRT plugin, C interface). Plain C++; no kernel code is needed to include it.
//
// launch() never synchronises with the host, allocates nothing and reads nothing back, so that it
// can be captured in a CUDA graph. Its results repeat bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(ADAPTIVE_K_SIMT)
#include "testing/simt/runtime.h"  // host stand-ins for cudaError_t and cudaStream_t, tests only
#else
#include <cuda_runtime_api.h>
#endif

#include "operator/moe/params.h"

#if defined(__GNUC__)
#define ADAPTIVE_K_CUDA_API __attribute__((visibility("default")))
#else
#define ADAPTIVE_K_CUDA_API
#endif

namespace adaptive_k::cuda {

// The type of hidden_states, output, scales, and of the weights when they are not quantised.
// float32 is there for tests and debugging: it runs without tensor cores.
enum class ElementType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// How the expert weights lie in memory. MoeParams::weight_format, the CPU face's attribute, is not
// read here.
//
// kElement  [E, N, K] of the element type.
// kInt8     [E, N, K] int8.
// kInt4     [E, N, K / 2] bytes; the value with the even index along K in the low four bits,
//           both two's complement (-8 .. 7).
//
// where N, K are 2I (or I), H for gate_up (or up), and H, I for down. A quantised weight stands for
// value * scale, with scales [E, N, K / group_size] of the element type, one for each group_size
// neighbours along K; group_size 0 means one for the whole row of K.
enum class WeightStorage : int32_t { kElement = 0, kInt8 = 1, kInt4 = 2 };

// kDecode streams each chosen expert's weights once past a few tokens; kPrefill multiplies tiles of
// tokens on the tensor cores. kAuto takes one by the number of tokens.
enum class Path : int32_t { kAuto = 0, kDecode = 1, kPrefill = 2 };

// Everything that is known before the data is. T, H, I, E, P and C of the operator's description.
struct MoeShape {
  int64_t tokens = 0;
  int32_t hidden = 0;
  int32_t intermediate = 0;
  int32_t experts = 0;
  int32_t policies = 0;
  int32_t choices = 0;
  ElementType element = ElementType::kFloat16;
  WeightStorage weights = WeightStorage::kElement;
  int32_t group_size = 0;  // read when the weights are quantised
  Path path = Path::kAuto;
};

// Device pointers, row-major and contiguous, aligned to 16 bytes where marked *.
struct MoeArguments {
  const void* hidden_states = nullptr;    // * [T, H] element type
  const float* router_logits = nullptr;   // [T, E]
  const int32_t* policy_index = nullptr;  // [T], clamped into [0, P)
  const int32_t* policy_kind = nullptr;   // [P]
  const float* thresholds = nullptr;      // [P, C - 1], may be null when C == 1
  const int32_t* k_values = nullptr;      // [P, C]
  const void* up = nullptr;               // * gate_up [E, 2I, H] or up [E, I, H], see WeightStorage
  const void* down = nullptr;             // * [E, H, I]
  const void* up_scales = nullptr;        // null unless quantised
  const void* down_scales = nullptr;      // null unless quantised
  const float* correction_bias = nullptr;  // [E] or null
  const float* expert_norms = nullptr;     // [E] or null, which is as all ones
  void* output = nullptr;                  // * [T, H] element type
  int32_t* k = nullptr;                    // [T]
  float* entropy = nullptr;                // [T]
};

// Limits of this implementation.
constexpr int32_t kMaxExperts = 512;
constexpr int32_t kMaxSelected = 32;

// Returns nullptr when this implementation runs such a layer, else the sentence that says why not.
// The number of tokens may be 0; a face that knows only its upper bound checks with that.
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
