// SPDX-License-Identifier: Apache-2.0
// A counting sort whose result does not depend on the order in which threads run. Each block takes
// a chunk of tokens and marks, in a bitmap of one bit for each (expert, token), who selected what.
// A row's place is then: the expert's first row, plus the rows of earlier chunks, plus the bits
// before its own.
#include "device.h"
#include "plan.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWords = kPlanTokens / 32;
static_assert(kThreads >= kMaxExperts, "the scan has a thread for each expert");

struct PlanShared {
  uint32_t bitmap[kMaxExperts * kWords];
  int32_t base[kMaxExperts];
  int32_t warp_rows[kThreads / 32];
  int32_t warp_active[kThreads / 32];
};

// Marks the chunk's selections. Ends with a barrier.
__device__ void fill_bitmap(const PlanArguments& a, int64_t first_token, PlanShared& shared) {
  for (int i = threadIdx.x; i < a.num_experts * kWords; i += kThreads) shared.bitmap[i] = 0;
  __syncthreads();
  const int64_t left = a.tokens - first_token;
  const int tokens = left < kPlanTokens ? static_cast<int>(left) : kPlanTokens;
  for (int i = threadIdx.x; i < tokens * a.capacity; i += kThreads) {
    const int t = i / a.capacity, j = i % a.capacity;
    if (j >= a.k[first_token + t]) continue;
    const int e = a.experts[(first_token + t) * a.capacity + j];
    atomicOr(&shared.bitmap[e * kWords + t / 32], 1u << (t % 32));
  }
  if (!fault(kFaultPlanBarrier)) __syncthreads();
}

__device__ int rows_in_chunk(const PlanShared& shared, int e) {
  int rows = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) rows += __popc(shared.bitmap[e * kWords + w]);
  return rows;
}

// Places the chunk's rows, with the first row of each expert in this chunk in shared.base.
__device__ void place_rows(const PlanArguments& a, int64_t first_token, PlanShared& shared) {
  const int64_t left = a.tokens - first_token;
  const int tokens = left < kPlanTokens ? static_cast<int>(left) : kPlanTokens;
  for (int i = threadIdx.x; i < tokens * a.capacity; i += kThreads) {
    const int t = i / a.capacity, j = i % a.capacity;
    if (j >= a.k[first_token + t]) continue;
    const int64_t slot = (first_token + t) * a.capacity + j;
    const int e = a.experts[slot];
    int row = shared.base[e];
    for (int w = 0; w < t / 32; ++w) row += __popc(shared.bitmap[e * kWords + w]);
    if (!fault(kFaultPlanRank))
      row += __popc(shared.bitmap[e * kWords + t / 32] & ((1u << (t % 32)) - 1u));
    a.row_token[row] = static_cast<int32_t>(first_token) + t;
    a.token_rows[slot] = row;
  }
}

// From the rows of each expert (thread e brings expert e's; others 0) to offsets and the list of
// active experts. Returns the first row of the thread's expert. All threads of the block.
__device__ int scan_experts(const PlanArguments& a, int rows, PlanShared& shared) {
  const int e = threadIdx.x, lane = e % 32, warp = e / 32;
  int rows_before = rows;  // inclusive first
  int active_before = rows > 0;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int more_rows = __shfl_up_sync(kAllLanes, rows_before, delta);
    const int more_active = __shfl_up_sync(kAllLanes, active_before, delta);
    if (lane >= delta) {
      rows_before += more_rows;
      active_before += more_active;
    }
  }
  if (lane == 31) {
    shared.warp_rows[warp] = rows_before;
    shared.warp_active[warp] = active_before;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    rows_before += shared.warp_rows[w];
    active_before += shared.warp_active[w];
  }
  rows_before -= rows;
  if (e < a.num_experts) {
    a.offsets[e] = rows_before;
    if (rows > 0) a.active[active_before - 1] = e;
    if (e == a.num_experts - 1) {
      a.offsets[e + 1] = rows_before + rows;
      *a.num_active = active_before;
    }
  }
  return rows_before;
}

// All in one, for a single chunk.
__global__ void __launch_bounds__(kThreads) plan_one_chunk(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  fill_bitmap(a, 0, shared);
  const int e = threadIdx.x;
  const int first = scan_experts(a, e < a.num_experts ? rows_in_chunk(shared, e) : 0, shared);
  if (e < a.num_experts) shared.base[e] = first;
  __syncthreads();
  place_rows(a, 0, shared);
}

__global__ void __launch_bounds__(kThreads) plan_count(PlanArguments a) {
  auto& shared = shared_memory<PlanShared>();
  fill_bitmap(a, static_cast<int64_t>(blockIdx.x) * kPlanTokens, shared);
  const int e = threadIdx.x;
  if (e < a.num_experts)
    a.chunk_counts[static_cast<int64_t>(blockIdx.x) * a.num_experts + e] = rows_in_chunk(shared, e);
}

// One block: turns the counts of each chunk into the number of rows in earlier chunks.
__global__ void __launch_bounds__(kThreads) plan_scan(PlanArguments a, int32_t chunks) {
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

__global__ void __launch_bounds__(kThreads) plan_place(PlanArguments a) {
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
  const dim3 threads(kThreads);
  if (chunks == 1)
    return ADAPTIVE_K_LAUNCH(plan_one_chunk, dim3(1), threads, sizeof(PlanShared), stream, a);
  ADAPTIVE_K_RETURN_IF(
      ADAPTIVE_K_LAUNCH(plan_count, dim3(chunks), threads, sizeof(PlanShared), stream, a));
  ADAPTIVE_K_RETURN_IF(ADAPTIVE_K_LAUNCH(plan_scan, dim3(1), threads, sizeof(PlanShared), stream, a,
                                         static_cast<int32_t>(chunks)));
  return ADAPTIVE_K_LAUNCH(plan_place, dim3(chunks), threads, sizeof(PlanShared), stream, a);
}

}  // namespace adaptive_k::cuda
