// SPDX-License-Identifier: Apache-2.0
// Data-center Blackwell: tcgen05 fed by the tensor memory accelerator, by one multiprocessor or,
// for many rows, by two together.
#include "cuda/moe/grouped_gemm/cutlass3.h"

namespace adaptive_k::cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_32;
using cute::_64;

template <typename Element>
cudaError_t run_for(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  using Few =
      Cutlass3Gemm<Element, cutlass::arch::Sm100, cute::Shape<_128, _32, _64>,
                   cute::Shape<_1, _1, _1>, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmSm100,
                   cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>;
  using Many =
      Cutlass3Gemm<Element, cutlass::arch::Sm100, cute::Shape<_256, _128, _64>,
                   cute::Shape<_2, _1, _1>, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized2SmSm100,
                   cutlass::epilogue::PtrArrayTmaWarpSpecialized2Sm>;
  return few_rows_per_expert(p) ? run_cutlass3<Few>(p, workspace, stream)
                                : run_cutlass3<Many>(p, workspace, stream);
}

}  // namespace

cudaError_t grouped_gemm_sm100(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  if (p.element == ElementType::kFloat16) return run_for<cutlass::half_t>(p, workspace, stream);
  return run_for<cutlass::bfloat16_t>(p, workspace, stream);
}

}  // namespace adaptive_k::cuda
