// SPDX-License-Identifier: Apache-2.0
// What the CUTLASS files share. Each is compiled for its own architectures only.
#pragma once

#include <cutlass/cutlass.h>

#include <cstddef>
#include <cstdint>

#include "cuda/moe/grouped_gemm.h"

namespace adaptive_k::cuda {

cudaError_t grouped_gemm_sm80(const GroupedGemm& problem, void* workspace, cudaStream_t stream);
cudaError_t grouped_gemm_sm90(const GroupedGemm& problem, void* workspace, cudaStream_t stream);
cudaError_t grouped_gemm_sm100(const GroupedGemm& problem, void* workspace, cudaStream_t stream);

// An expert's row tile is chosen by the mean number of rows: small tiles waste less where experts
// have few, large ones read the weights less often where they have many.
inline bool few_rows_per_expert(const GroupedGemm& p) { return p.max_rows <= 64 * p.all_experts; }

// Room in the workspace for each part of the kernels' arguments: this many bytes for an expert,
// and a remainder for what a kernel keeps for itself (tensor maps for each multiprocessor).
constexpr size_t kGroupedBytesPerExpert = 256;
constexpr size_t kGroupedArrays = 16;
constexpr size_t kGroupedKernelBytes = size_t{1} << 20;

// Hands out arrays with one entry an expert.
class Carver {
 public:
  Carver(void* workspace, int32_t experts)
      : at_(static_cast<char*>(workspace)), experts_(static_cast<size_t>(experts)) {}

  template <typename T>
  T* take() {
    T* here = reinterpret_cast<T*>(at_);
    at_ += (experts_ * sizeof(T) + 127) / 128 * 128;
    return here;
  }
  void* rest() const { return at_; }

 private:
  char* at_;
  size_t experts_;
};

// Runs once the first step has gone well.
template <typename Run>
cudaError_t status_of(cutlass::Status initialised, const Run& run) {
  if (initialised != cutlass::Status::kSuccess || run() != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

}  // namespace adaptive_k::cuda
