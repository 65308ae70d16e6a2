// SPDX-License-Identifier: Apache-2.0
// The order in which the experts' work is done: one row for each pair of a token and a selected
// expert, sorted by expert and within an expert by token.
#pragma once

#include "cuda/moe/launcher.h"

namespace adaptive_k::cuda {

// Tokens that one block plans.
constexpr int kPlanTokens = 128;

struct PlanArguments {
  int64_t tokens;
  int32_t num_experts;
  int32_t capacity;
  ExpertRange range;       // whose products are computed; the plan is of all experts
  const int32_t* k;        // [T]
  const int32_t* experts;  // [T, capacity], of which the first k count
  int32_t* chunk_counts;   // [E, ceil(T / kPlanTokens) + 1] scratch
  int32_t* offsets;        // [E + 1] where each expert's rows begin; the last is the number of rows
  int32_t* active;         // [E] those of the range that have rows, rising, counted from its first
  int32_t* num_active;     // [1]
  int32_t* expert_load;    // [E] the rows of each expert, or null
  int32_t* row_token;      // [T * capacity] the token of each row
  int32_t* token_rows;  // [T, capacity] the row of each selected expert, by rank; -1 if another's
};

cudaError_t plan(const PlanArguments& arguments, cudaStream_t stream);

}  // namespace adaptive_k::cuda
