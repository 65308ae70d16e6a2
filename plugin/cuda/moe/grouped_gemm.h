// SPDX-License-Identifier: Apache-2.0
// One matrix product for each expert, with the number of rows of each known on the device only.
// What multiplies is chosen by the device's architecture:
//
// grouped_gemm/sm80.cu   CUTLASS 2.x, mma.sync and cp.async: Ampere, Ada, and whatever has nothing
//                        better (GeForce Blackwell)
// grouped_gemm/sm90.cu   CUTLASS 3.x, wgmma and TMA: Hopper
// grouped_gemm/sm100.cu  CUTLASS 3.x, tcgen05 and TMA: data-center Blackwell
// grouped_gemm/host.cu   a plain loop in place of them, in the interpreter's build only
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// c[r, N] = activation(a[r, K] . b[e, N, K]^T) for offsets[e] <= r < offsets[e + 1]; rows at or
// beyond offsets[E] are not touched. float16 or bfloat16; sums, and the activation of them, in
// float32. K and N are multiples of 8.
struct GroupedGemm {
  ElementType element;
  int32_t experts, n, k;
  int64_t tokens;          // of the layer
  int64_t max_rows;        // of all experts of the layer; no fewer than offsets[E]
  int32_t all_experts;     // that share them: a call may have the weights of a range alone
  const int32_t* offsets;  // [E + 1], on the device
  const void* a;           // [max_rows, K]
  const void* b;           // [E, N, K]
  void* c;                 // [max_rows, N]
  bool activated;          // false: c is the product
  Activation activation;   // not a gated one
};

// Whether there is a product for this element type at all.
bool grouped_gemm_supports(ElementType element);

// Bytes of scratch memory, for any device.
size_t grouped_gemm_workspace(int32_t experts);

cudaError_t grouped_gemm(const GroupedGemm& problem, void* workspace, cudaStream_t stream);

}  // namespace adaptive_k::cuda
