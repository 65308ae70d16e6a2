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

// What the step's tokens bring an expert before kSharedExperts rows add theirs.
struct Payment {
  bool kept = false;  // it is read whatever the price
  double worth = 0;   // in prices
};

ADAPTIVE_K_HD bool pays(const Payment& payment) { return payment.kept || payment.worth >= 1; }

// Adds a token's part. Tokens come in rising order; those without the expert may be left out.
ADAPTIVE_K_HD void pay(const SharingStep& s, int64_t token, int32_t expert, Payment* payment) {
  const int32_t rank = rank_of(s, token, expert);
  if (rank == s.k[token]) return;
  const PolicyRow row = row_of(s, token);
  if (!takes_part(row, s.entropy[token]) || rank < k_min_of(row)) {
    payment->kept = true;
  } else if (row.kind == static_cast<int32_t>(PolicyKind::kSharedPrice)) {
    const double weight = s.weights[token * s.capacity + rank];
    payment->worth += weight * weight / parameter_of(row, 0.0f);
  }
}

// Adds what a token gives an expert if it follows this kSharedExperts row. Tokens as in pay().
ADAPTIVE_K_HD void give_to_row(const SharingStep& s, int64_t token, int32_t policy, int32_t expert,
                               double* worth) {
  if (clamp_policy(s.policy_index[token], s.policies) != policy ||
      s.entropy[token] != s.entropy[token])
    return;
  const int32_t rank = rank_of(s, token, expert);
  if (rank == s.k[token]) return;
  const double weight = s.weights[token * s.capacity + rank];
  *worth += weight * weight;
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
