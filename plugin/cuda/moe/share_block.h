// SPDX-License-Identifier: Apache-2.0
// Which experts a step with sharing tokens reads, decided by one block with a thread for each
// expert. The rule is operator/moe/sharing.h's. A thread finds the tokens that have its expert in
// the plan's bitmap, in their order, so that its sums are the host's to the bit.
#pragma once

#include "cuda/device.h"
#include "cuda/moe/plan_chunk.h"
#include "cuda/moe/route.h"
#include "operator/moe/sharing.h"

namespace adaptive_k::cuda {

template <int kExperts>
struct ShareShared {
  double worth[kExperts];
  uint8_t paid[kExperts];
};

__device__ __forceinline__ SharingStep sharing_step(const RouteArguments& a) {
  return {a.tokens,      a.capacity,   a.num_policies, a.num_choices, a.policy_index,
          a.policy_kind, a.thresholds, a.k_values,     a.k,           a.entropy,
          a.experts,     a.weights};
}

// Whether a token that was routed alone chooses again.
__device__ __forceinline__ bool shares(const RouteArguments& a, int64_t token) {
  const SharingStep step = sharing_step(a);
  return takes_part(row_of(step, token), a.entropy[token]);
}

// Whether the table has a row that shares, which few have. Every warp finds out for itself.
__device__ __forceinline__ bool has_sharing_row(const RouteArguments& a) {
  bool found = false;
  for (int p = threadIdx.x % 32; p < a.num_policies; p += 32)
    found = found || is_sharing(a.policy_kind[p]);
  return __any_sync(kAllLanes, found);
}

// The first row after `row` that a token which takes part follows, or num_policies. All threads of
// the block.
__device__ __forceinline__ int next_sharing_row(const RouteArguments& a, int row,
                                                PlanShared& plan) {
  int next = a.num_policies;
  for (int64_t t = threadIdx.x; t < a.tokens; t += kPlanThreads) {
    const int its = clamp_policy(a.policy_index[t], a.num_policies);
    if (its > row && its < next && shares(a, t)) next = its;
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, next, bits);
    next = other < next ? other : next;
  }
  if (threadIdx.x % 32 == 0) plan.warp_rows[threadIdx.x / 32] = next;
  __syncthreads();
  for (int w = 0; w < kPlanThreads / 32; ++w)
    next = plan.warp_rows[w] < next ? plan.warp_rows[w] : next;
  __syncthreads();  // before the list is used again
  return next;
}

// Calls body(t) for each token t that has the thread's expert, in rising order.
template <typename Body>
__device__ __forceinline__ void for_tokens_of_expert(const PlanArguments& a, PlanShared& plan,
                                                     const Body& body) {
  for (int64_t first = 0; first < a.tokens; first += kPlanTokens) {
    fill_bitmap(a, first, plan);
    if (static_cast<int>(threadIdx.x) < a.num_experts) {
      for (int w = 0; w < kPlanWords; ++w) {
        uint32_t bits = plan.bitmap[threadIdx.x * kPlanWords + w];
        for (; bits != 0; bits &= bits - 1)
          body(first + w * 32 + __ffs(static_cast<int>(bits)) - 1);
      }
    }
    if (!fault(kFaultShareChunkBarrier)) __syncthreads();  // before the bitmap is cleared
  }
}

// Marks in `read` [E] what the step reads, and returns true; or returns false if no token takes
// part. All threads of a block of kPlanThreads, which may themselves have routed the tokens just
// before. Ends with a barrier.
template <int kExperts>
__device__ bool share(const RouteArguments& a, const PlanArguments& planning, PlanShared& plan,
                      ShareShared<kExperts>& shared, uint8_t* read) {
  if (!has_sharing_row(a)) return false;
  if (!fault(kFaultShareStartBarrier)) __syncthreads();  // what other warps routed
  int row = next_sharing_row(a, -1, plan);
  if (row == a.num_policies) return false;

  const SharingStep step = sharing_step(a);
  const int e = threadIdx.x;
  Payment payment;
  for_tokens_of_expert(planning, plan, [&](int64_t t) { pay(step, t, e, &payment); });
  bool is_read = pays(payment);
  if (e < a.num_experts) shared.paid[e] = is_read;
  for (; row < a.num_policies; row = next_sharing_row(a, row, plan)) {
    const PolicyRow policy =
        policy_row(row, a.policy_kind, a.thresholds, a.k_values, a.num_policies, a.num_choices);
    if (policy.kind != static_cast<int32_t>(PolicyKind::kSharedExperts)) continue;
    double worth = 0;
    for_tokens_of_expert(planning, plan, [&](int64_t t) { give_to_row(step, t, row, e, &worth); });
    if (e < a.num_experts) shared.worth[e] = worth;
    if (!fault(kFaultShareWorthBarrier)) __syncthreads();
    if (e < a.num_experts &&
        is_added(shared.worth, shared.paid, a.num_experts, e, additions_of_row(policy)))
      is_read = true;
  }
  if (e < a.num_experts) read[e] = is_read;
  if (!fault(kFaultShareBarrier)) __syncthreads();
  return true;
}

}  // namespace adaptive_k::cuda
