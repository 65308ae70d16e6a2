// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"
#include "cuda/moe/route.h"
#include "cuda/moe/route_team.h"
#include "cuda/moe/share_block.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kBlockWarps = 4;

__global__ void __launch_bounds__(kBlockWarps * 32) route_by_warp(RouteArguments a, bool again) {
  struct Shared {
    TeamShared<1> teams[kBlockWarps];
  };
  TeamShared<1>& shared = shared_memory<Shared>().teams[threadIdx.x / 32];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / 32;
  if (token >= a.tokens || (again && !shares(a, token))) return;  // the whole warp
  Team<1> team(shared);
  route_with_team<1>(a, token, again ? a.read : nullptr, team, shared);
}

__global__ void __launch_bounds__(kBlockWarps * 32) route_by_block(RouteArguments a, bool again) {
  auto& shared = shared_memory<TeamShared<kBlockWarps>>();
  if (again && !shares(a, blockIdx.x)) return;  // the whole block
  Team<kBlockWarps> team(shared);
  route_with_team<kBlockWarps>(a, blockIdx.x, again ? a.read : nullptr, team, shared);
}

}  // namespace

cudaError_t route(const RouteArguments& a, bool again, cudaStream_t stream) {
  if (a.num_experts <= TeamShared<1>::kExperts) {
    const auto blocks = static_cast<unsigned>(divide_up(a.tokens, kBlockWarps));
    return ADAPTIVE_K_LAUNCH(route_by_warp, dim3(blocks), dim3(kBlockWarps * 32),
                             kBlockWarps * sizeof(TeamShared<1>), stream, a, again);
  }
  return ADAPTIVE_K_LAUNCH(route_by_block, dim3(static_cast<unsigned>(a.tokens)),
                           dim3(kBlockWarps * 32), sizeof(TeamShared<kBlockWarps>), stream, a,
                           again);
}

}  // namespace adaptive_k::cuda
