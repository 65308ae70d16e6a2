// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"
#include "cuda/moe/plan.h"
#include "cuda/moe/plan_chunk.h"

namespace adaptive_k::cuda {
namespace {

__global__ void __launch_bounds__(kPlanThreads, 1) plan_one_chunk(PlanArguments a) {
  plan_chunk(a, shared_memory<PlanShared>());
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_count(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  fill_bitmap(a, static_cast<int64_t>(blockIdx.x) * kPlanTokens, shared);
  const int e = threadIdx.x;
  if (e < a.num_experts)
    a.chunk_counts[static_cast<int64_t>(blockIdx.x) * a.num_experts + e] = rows_in_chunk(shared, e);
}

// One block: turns the counts of each chunk into the number of rows in earlier chunks.
__global__ void __launch_bounds__(kPlanThreads, 1) plan_scan(PlanArguments a, int32_t chunks) {
  auto& shared = shared_memory<PlanShared>();
  const int e = threadIdx.x;
  int rows = 0;
  if (e < a.num_experts) {
    for (int c = 0; c < chunks; ++c) {
      int32_t& count = a.chunk_counts[static_cast<int64_t>(c) * a.num_experts + e];
      const int here = count;
      count = fault(kFaultPlanBase) ? 0 : rows;
      rows += here;
    }
  }
  scan_experts(a, rows, shared);
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_place(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  const int e = threadIdx.x;
  if (e < a.num_experts)
    shared.base[e] =
        a.offsets[e] + a.chunk_counts[static_cast<int64_t>(blockIdx.x) * a.num_experts + e];
  fill_bitmap(a, static_cast<int64_t>(blockIdx.x) * kPlanTokens, shared);
  place_rows(a, static_cast<int64_t>(blockIdx.x) * kPlanTokens, shared);
}

}  // namespace

cudaError_t plan(const PlanArguments& a, cudaStream_t stream) {
  const auto chunks = static_cast<unsigned>(divide_up(a.tokens, kPlanTokens));
  const dim3 threads(kPlanThreads);
  if (chunks == 1)
    return ADAPTIVE_K_LAUNCH(plan_one_chunk, dim3(1), threads, sizeof(PlanShared), stream, a);
  ADAPTIVE_K_RETURN_IF(
      ADAPTIVE_K_LAUNCH(plan_count, dim3(chunks), threads, sizeof(PlanShared), stream, a));
  ADAPTIVE_K_RETURN_IF(ADAPTIVE_K_LAUNCH(plan_scan, dim3(1), threads, sizeof(PlanShared), stream, a,
                                         static_cast<int32_t>(chunks)));
  return ADAPTIVE_K_LAUNCH(plan_place, dim3(chunks), threads, sizeof(PlanShared), stream, a);
}

}  // namespace adaptive_k::cuda
