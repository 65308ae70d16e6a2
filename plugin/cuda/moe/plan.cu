// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"
#include "cuda/moe/plan.h"
#include "cuda/moe/plan_chunk.h"

namespace adaptive_k::cuda {
namespace {

__global__ void __launch_bounds__(kPlanThreads, 1) plan_one_chunk(PlanArguments a) {
  plan_chunk(a, shared_memory<PlanShared>());
}

// Where the counts of an expert's chunks lie; behind them is the expert's own.
__device__ __forceinline__ int32_t* counts_of(const PlanArguments& a, int expert, int chunks) {
  return a.chunk_counts + static_cast<int64_t>(expert) * (chunks + 1);
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_count(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  fill_bitmap(a, static_cast<int64_t>(blockIdx.x) * kPlanTokens, shared);
  const int e = threadIdx.x;
  if (e < a.num_experts)
    counts_of(a, e, static_cast<int>(gridDim.x))[blockIdx.x] = rows_in_chunk(shared, e);
}

// A warp for each expert: turns the counts of its chunks into the number of its rows in earlier
// chunks, 32 chunks at a time.
__global__ void __launch_bounds__(kPlanThreads, 1) plan_scan(PlanArguments a, int32_t chunks) {
  const int lane = threadIdx.x % 32;
  const int e = static_cast<int>(blockIdx.x) * (kPlanThreads / 32) + threadIdx.x / 32;
  if (e >= a.num_experts) return;  // the whole warp
  int32_t* const counts = counts_of(a, e, chunks);
  int rows = 0;  // of the chunks before these 32
  for (int first = 0; first < chunks; first += 32) {
    const int c = first + lane;
    const int here = c < chunks ? counts[c] : 0;
    int before = here;  // inclusive first
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int more = __shfl_up_sync(kAllLanes, before, delta);
      if (lane >= delta) before += more;
    }
    if (c < chunks) counts[c] = fault(kFaultPlanBase) ? 0 : rows + before - here;
    rows += __shfl_sync(kAllLanes, before, 31);
  }
  if (lane == 0) counts[chunks] = rows;
}

// Each block finds the experts' first rows for itself, which takes less time than a launch.
__global__ void __launch_bounds__(kPlanThreads, 1) plan_place(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  const int e = threadIdx.x, chunks = static_cast<int>(gridDim.x);
  const bool has_expert = e < a.num_experts;
  const int32_t* const counts = counts_of(a, has_expert ? e : 0, chunks);
  const int first = scan_experts(a, has_expert ? counts[chunks] : 0, shared, blockIdx.x == 0);
  if (has_expert) shared.base[e] = first + counts[blockIdx.x];
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
  const auto scans = static_cast<unsigned>(divide_up(a.num_experts, kPlanThreads / 32));
  ADAPTIVE_K_RETURN_IF(ADAPTIVE_K_LAUNCH(plan_scan, dim3(scans), threads, 0, stream, a,
                                         static_cast<int32_t>(chunks)));
  return ADAPTIVE_K_LAUNCH(plan_place, dim3(chunks), threads, sizeof(PlanShared), stream, a);
}

}  // namespace adaptive_k::cuda
