// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"
#include "cuda/moe/plan_chunk.h"
#include "cuda/moe/route_and_plan.h"
#include "cuda/moe/route_team.h"
#include "cuda/moe/share_block.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kWarps = kPlanThreads / 32;
// Up to this many tokens one block routes faster than a launch more would take.
constexpr int64_t kRoutedByOneBlock = 2 * kWarps;
constexpr int32_t kExpertsOfOneBlock = TeamShared<1>::kExperts;

struct OneBlockShared {
  TeamShared<1> teams[kWarps];
  PlanShared plan;
  ShareShared<kExpertsOfOneBlock> share;
  uint8_t read[kExpertsOfOneBlock];
};
static_assert(sizeof(OneBlockShared) <= 48 << 10, "no attribute is needed");

// One block: its warps take the tokens in turn, unless they have been routed; those that share take
// a second turn; then all of it plans.
__global__ void __launch_bounds__(kPlanThreads, 1)
    route_and_plan_kernel(RouteArguments routing, PlanArguments planning, bool routed) {
  auto& shared = shared_memory<OneBlockShared>();
  const int warp = threadIdx.x / 32;
  Team<1> team(shared.teams[warp]);
  const uint8_t* read = nullptr;
  for (bool again = routed;; again = true) {
    if (again) {
      if (!share(routing, planning, shared.plan, shared.share, shared.read)) break;
      read = shared.read;
    }
    for (int64_t token = warp; token < routing.tokens; token += kWarps) {
      if (again && !shares(routing, token)) continue;
      route_with_team<1>(routing, token, read, team, shared.teams[warp]);
      __syncwarp();  // the team's memory is used again
    }
    if (again) break;
  }
  // The plan reads what other warps wrote. Its own first barrier comes before that.
  plan_chunk(planning, shared.plan);
}

struct ShareKernelShared {
  PlanShared plan;
  ShareShared<kMaxExpertsOnGpu> share;
};

__global__ void __launch_bounds__(kPlanThreads, 1)
    share_kernel(RouteArguments routing, PlanArguments planning) {
  auto& shared = shared_memory<ShareKernelShared>();
  share(routing, planning, shared.plan, shared.share, routing.read);
}

}  // namespace

cudaError_t route_and_plan(const RouteArguments& routing, const PlanArguments& planning,
                           cudaStream_t stream) {
  const bool one_block = routing.tokens <= kPlanTokens && routing.num_experts <= kExpertsOfOneBlock;
  const bool routed = !one_block || routing.tokens > kRoutedByOneBlock;
  if (routed) ADAPTIVE_K_RETURN_IF(route(routing, false, stream));
  if (one_block)
    return ADAPTIVE_K_LAUNCH(route_and_plan_kernel, dim3(1), dim3(kPlanThreads),
                             sizeof(OneBlockShared), stream, routing, planning, routed);
  // The host does not know the policies: without a sharing token these two return at once.
  ADAPTIVE_K_RETURN_IF(ADAPTIVE_K_LAUNCH(share_kernel, dim3(1), dim3(kPlanThreads),
                                         sizeof(ShareKernelShared), stream, routing, planning));
  ADAPTIVE_K_RETURN_IF(route(routing, true, stream));
  return plan(planning, stream);
}

}  // namespace adaptive_k::cuda
