// SPDX-License-Identifier: Apache-2.0
// The pieces of the plan, a counting sort whose result does not depend on the order in which
// threads run. Each block takes a chunk of tokens and marks, in a bitmap of one bit for each
// (expert, token), who selected what. A row's place is then: the expert's first row, plus the rows
// of earlier chunks, plus the bits before its own.
#pragma once

#include "cuda/device.h"
#include "cuda/moe/plan.h"

namespace adaptive_k::cuda {

constexpr int kPlanThreads = 512;
constexpr int kPlanWords = kPlanTokens / 32;
static_assert(kPlanThreads >= kMaxExpertsOnGpu, "the scan has a thread for each expert");

struct PlanShared {
  uint32_t bitmap[kMaxExpertsOnGpu * kPlanWords];
  int32_t base[kMaxExpertsOnGpu];
  int32_t warp_rows[kPlanThreads / 32];
  int32_t warp_active[kPlanThreads / 32];
};

// Marks the chunk's selections. Ends with a barrier.
__device__ __forceinline__ void fill_bitmap(const PlanArguments& a, int64_t first_token,
                                            PlanShared& shared) {
  for (int i = threadIdx.x; i < a.num_experts * kPlanWords; i += kPlanThreads) shared.bitmap[i] = 0;
  if (!fault(kFaultPlanStartBarrier)) __syncthreads();
  const int64_t left = a.tokens - first_token;
  const int tokens = left < kPlanTokens ? static_cast<int>(left) : kPlanTokens;
  for (int i = threadIdx.x; i < tokens * a.capacity; i += kPlanThreads) {
    const int t = i / a.capacity, j = i % a.capacity;
    if (j >= a.k[first_token + t]) continue;
    const int e = a.experts[(first_token + t) * a.capacity + j];
    atomicOr(&shared.bitmap[e * kPlanWords + t / 32], 1u << (t % 32));
  }
  if (!fault(kFaultPlanBarrier)) __syncthreads();
}

__device__ __forceinline__ int rows_in_chunk(const PlanShared& shared, int e) {
  int rows = 0;
#pragma unroll
  for (int w = 0; w < kPlanWords; ++w) rows += __popc(shared.bitmap[e * kPlanWords + w]);
  return rows;
}

// Places the chunk's rows, with the first row of each expert in this chunk in shared.base.
__device__ __forceinline__ void place_rows(const PlanArguments& a, int64_t first_token,
                                           PlanShared& shared) {
  const int64_t left = a.tokens - first_token;
  const int tokens = left < kPlanTokens ? static_cast<int>(left) : kPlanTokens;
  for (int i = threadIdx.x; i < tokens * a.capacity; i += kPlanThreads) {
    const int t = i / a.capacity, j = i % a.capacity;
    if (j >= a.k[first_token + t]) continue;
    const int64_t slot = (first_token + t) * a.capacity + j;
    const int e = a.experts[slot];
    int row = shared.base[e];
    for (int w = 0; w < t / 32; ++w) row += __popc(shared.bitmap[e * kPlanWords + w]);
    if (!fault(kFaultPlanRank))
      row += __popc(shared.bitmap[e * kPlanWords + t / 32] & ((1u << (t % 32)) - 1u));
    a.row_token[row] = static_cast<int32_t>(first_token) + t;
    a.token_rows[slot] = is_in(a.range, e) ? row : -1;
  }
}

// From the rows of each expert (thread e brings expert e's; others 0) to offsets and the list of
// active experts, which are written if `writes`. Returns the first row of the thread's expert. All
// threads of the block.
__device__ __forceinline__ int scan_experts(const PlanArguments& a, int rows, PlanShared& shared,
                                            bool writes = true) {
  const int e = threadIdx.x, lane = e % 32, warp = e / 32;
  int rows_before = rows;  // inclusive first
  const bool active =
      rows > 0 && is_in(a.range, e) && !(fault(kFaultPlanRange) && e == a.range.first);
  int active_before = active;
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
  if (writes && e < a.num_experts) {
    a.offsets[e] = rows_before;
    if (a.expert_load != nullptr) a.expert_load[e] = rows;
    if (active) a.active[active_before - 1] = e - a.range.first;
    if (e == a.num_experts - 1) {
      a.offsets[e + 1] = rows_before + rows;
      *a.num_active = active_before;
    }
  }
  return rows_before;
}

// The whole plan of a single chunk, by one block.
__device__ __forceinline__ void plan_chunk(const PlanArguments& a, PlanShared& shared) {
  fill_bitmap(a, 0, shared);
  const int e = threadIdx.x;
  const int first = scan_experts(a, e < a.num_experts ? rows_in_chunk(shared, e) : 0, shared);
  if (e < a.num_experts) shared.base[e] = first;
  __syncthreads();
  place_rows(a, 0, shared);
}

}  // namespace adaptive_k::cuda
