// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"
#include "cuda/moe/plan_chunk.h"
#include "cuda/moe/route_and_plan.h"
#include "cuda/moe/route_team.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kWarps = kPlanThreads / 32;

// One block: its warps take the tokens in turn, then all of it plans.
__global__ void __launch_bounds__(kPlanThreads)
    route_and_plan_kernel(RouteArguments routing, PlanArguments planning) {
  struct Shared {
    TeamShared<1> teams[kWarps];
    PlanShared plan;
  };
  auto& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / 32;
  Team<1> team(shared.teams[warp]);
  for (int64_t token = warp; token < routing.tokens; token += kWarps) {
    route_with_team<1>(routing, token, team, shared.teams[warp]);
    __syncwarp();  // the team's memory is used again
  }
  // The plan reads what other warps wrote. Its own first barrier comes before that.
  plan_chunk(planning, shared.plan);
}

}  // namespace

bool route_and_plan_fits(int64_t tokens, int32_t num_experts) {
  return tokens <= 2 * kWarps && num_experts <= TeamShared<1>::kExperts;
}

cudaError_t route_and_plan(const RouteArguments& routing, const PlanArguments& planning,
                           cudaStream_t stream) {
  return ADAPTIVE_K_LAUNCH(route_and_plan_kernel, dim3(1), dim3(kPlanThreads),
                           kWarps * sizeof(TeamShared<1>) + sizeof(PlanShared), stream, routing,
                           planning);
}

}  // namespace adaptive_k::cuda
