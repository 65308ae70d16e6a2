// SPDX-License-Identifier: Apache-2.0
// The policy kinds that look at the whole step. A step reads an expert's weights once, however many
// of its tokens run it; tokens whose rows share agree on fewer experts to read:
//
//  1. Every token is routed as if it were alone, those of sharing rows at their k_max. A token
//     whose softmax is undefined takes no part: it keeps what it has then.
//  2. An expert is read if a token that takes no part runs it, or if it is among the first k_min of
//     one that does; or if what the sharing tokens' own choices would give it pays: the sum of
//     weight^2 / price over the tokens of kSharedPrice rows reaches 1. Then each kSharedExperts row
//     adds the N experts, not read so far, to which its own tokens give the largest sums of
//     weight^2 (ties: the lower index; an expert to which they give nothing is never added). Rows
//     do not see each other's additions.
//  3. Every sharing token takes the best k_max experts among those that are read; none if none is.
//
// Sums run over tokens in their order, in double: host and device agree to the bit.
#pragma once

#include <cstdint>

#include "operator/moe/routing.h"

namespace adaptive_k {

// The tokens of a step with their own choices, the results of route_token().
struct SharingStep {
  int64_t tokens;
  int32_t capacity;
  int32_t policies;
  int32_t choices;
  const int32_t* policy_index;  // [tokens]
  const int32_t* policy_kind;   // [policies]
  const float* thresholds;      // [policies, choices - 1]
  const int32_t* k_values;      // [policies, choices]
  const int32_t* k;             // [tokens]
  const float* entropy;         // [tokens]
  const int32_t* experts;       // [tokens, capacity], best first
  const float* weights;         // [tokens, capacity]
};

ADAPTIVE_K_HD PolicyRow row_of(const SharingStep& s, int64_t token) {
  return policy_row(s.policy_index[token], s.policy_kind, s.thresholds, s.k_values, s.policies,
                    s.choices);
}

ADAPTIVE_K_HD bool takes_part(const PolicyRow& row, float entropy) {
  return is_sharing(row.kind) && entropy == entropy;
}

// The rank that a token gave an expert, or its k.
ADAPTIVE_K_HD int32_t rank_of(const SharingStep& s, int64_t token, int32_t expert) {
  int32_t rank = 0;
  while (rank < s.k[token] && s.experts[token * s.capacity + rank] != expert) ++rank;
  return rank;
}

// Whether an expert is read before kSharedExperts rows add theirs.
ADAPTIVE_K_HD bool is_paid_for(const SharingStep& s, int32_t expert) {
  double worth = 0;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const int32_t rank = rank_of(s, t, expert);
    if (rank == s.k[t]) continue;
    const PolicyRow row = row_of(s, t);
    if (!takes_part(row, s.entropy[t]) || rank < k_min_of(row)) return true;
    if (row.kind != static_cast<int32_t>(PolicyKind::kSharedPrice)) continue;
    const double weight = s.weights[t * s.capacity + rank];
    worth += weight * weight / parameter_of(row, 0.0f);
  }
  return worth >= 1;
}

// What the tokens of one kSharedExperts row give an expert.
ADAPTIVE_K_HD double worth_to_row(const SharingStep& s, int32_t policy, int32_t expert) {
  double worth = 0;
  for (int64_t t = 0; t < s.tokens; ++t) {
    if (clamp_policy(s.policy_index[t], s.policies) != policy || s.entropy[t] != s.entropy[t])
      continue;
    const int32_t rank = rank_of(s, t, expert);
    if (rank == s.k[t]) continue;
    const double weight = s.weights[t * s.capacity + rank];
    worth += weight * weight;
  }
  return worth;
}

// How many experts a kSharedExperts row adds at most.
ADAPTIVE_K_HD int32_t additions_of_row(const PolicyRow& row) {
  const float asked = parameter_of(row, 0.0f);
  return asked > 0 ? static_cast<int32_t>(asked < kMaxKAttribute ? asked : kMaxKAttribute) : 0;
}

// Whether a kSharedExperts row adds an expert, given what it is worth to the row (`worth` of each
// expert) and what is read so far (`paid`).
ADAPTIVE_K_HD bool is_added(const double* worth, const uint8_t* paid, int32_t num_experts,
                            int32_t expert, int32_t additions) {
  if (paid[expert] || !(worth[expert] > 0)) return false;
  int32_t before = 0;
  for (int32_t e = 0; e < num_experts; ++e)
    before += !paid[e] && (worth[e] > worth[expert] || (worth[e] == worth[expert] && e < expert));
  return before < additions;
}

}  // namespace adaptive_k
