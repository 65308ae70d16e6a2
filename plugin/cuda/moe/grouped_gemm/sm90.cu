// SPDX-License-Identifier: Apache-2.0
// Hopper: wgmma fed by the tensor memory accelerator.
#include "cuda/moe/grouped_gemm/cutlass3.h"

namespace adaptive_k::cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_32;
using cute::_64;

template <typename Element, typename TileShape, typename ClusterShape>
using Sm90Gemm = Cutlass3Gemm<Element, cutlass::arch::Sm90, TileShape, ClusterShape,
                              cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative,
                              cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;

template <typename Element>
cudaError_t run_for(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  if (few_rows_per_expert(p))
    return run_cutlass3<Sm90Gemm<Element, cute::Shape<_128, _32, _64>, cute::Shape<_1, _1, _1>>>(
        p, workspace, stream);
  return run_cutlass3<Sm90Gemm<Element, cute::Shape<_256, _128, _64>, cute::Shape<_2, _1, _1>>>(
      p, workspace, stream);
}

}  // namespace

cudaError_t grouped_gemm_sm90(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  if (p.element == ElementType::kFloat16) return run_for<cutlass::half_t>(p, workspace, stream);
  return run_for<cutlass::bfloat16_t>(p, workspace, stream);
}

}  // namespace adaptive_k::cuda
