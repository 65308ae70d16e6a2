// SPDX-License-Identifier: Apache-2.0
// Routing and plan in one launch, for the few tokens of a decode step: where the products take some
// ten microseconds, a launch less is seen.
#pragma once

#include "cuda/moe/plan.h"
#include "cuda/moe/route.h"

namespace adaptive_k::cuda {

bool route_and_plan_fits(int64_t tokens, int32_t num_experts);

// As route() and then plan().
cudaError_t route_and_plan(const RouteArguments& routing, const PlanArguments& planning,
                           cudaStream_t stream);

}  // namespace adaptive_k::cuda
