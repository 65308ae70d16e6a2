// SPDX-License-Identifier: Apache-2.0
// Everything between the logits and the products: routing, sharing and plan, in as few launches as
// the number of tokens lets: where the products take some ten microseconds, a launch less is seen.
#pragma once

#include "cuda/moe/plan.h"
#include "cuda/moe/route.h"

namespace adaptive_k::cuda {

cudaError_t route_and_plan(const RouteArguments& routing, const PlanArguments& planning,
                           cudaStream_t stream);

}  // namespace adaptive_k::cuda
