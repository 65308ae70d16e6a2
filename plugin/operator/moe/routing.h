// SPDX-License-Identifier: Apache-2.0
// The routing of one token: entropy, choice of k, selection and weights. For host and device; all
// memory is the caller's. A kernel that spreads a token over several threads can call the pieces;
// route_token() puts them together for one thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "operator/moe/params.h"

namespace adaptive_k {

// A row of the policy table: what decides k for the tokens that follow it.
struct PolicyRow {
  int32_t kind;             // a PolicyKind
  const float* thresholds;  // [num_choices - 1]
  const int32_t* k_values;  // [num_choices]
  int32_t num_choices;
};

ADAPTIVE_K_HD int32_t clamp_policy(int32_t index, int32_t num_policies) {
  return index < 0 ? 0 : index < num_policies ? index : num_policies - 1;
}

// The row that a token follows. thresholds [policies, choices - 1], k_values [policies, choices].
ADAPTIVE_K_HD PolicyRow policy_row(int32_t index, const int32_t* policy_kind,
                                   const float* thresholds, const int32_t* k_values,
                                   int32_t num_policies, int32_t num_choices) {
  const int64_t p = clamp_policy(index, num_policies);
  return {policy_kind[p], thresholds + p * (num_choices - 1), k_values + p * num_choices,
          num_choices};
}

// The softmax over all raw logits, in the form from which every probability follows.
struct SoftmaxSummary {
  double max;      // the largest logit
  double sum;      // sum of exp(logit - max)
  double entropy;  // in nats; NaN when the softmax is undefined (a NaN or +inf,
                   // or all -inf)
};

ADAPTIVE_K_HD SoftmaxSummary summarize_softmax(const float* logits, int32_t num_experts) {
  SoftmaxSummary s;
  s.max = -INFINITY;
  for (int32_t e = 0; e < num_experts; ++e) s.max = logits[e] > s.max ? logits[e] : s.max;
  s.sum = 0;
  double weighted = 0;  // sum of exp(d) * d, with d = logit - max
  for (int32_t e = 0; e < num_experts; ++e) {
    const double d = logits[e] - s.max;
    const double p = exp(d);
    s.sum += p;
    // The limit of p d for d -> -inf is 0; so is what p == 0 adds.
    weighted += p == 0 ? 0 : p * d;
  }
  s.entropy = log(s.sum) - weighted / s.sum;
  // Rounding may leave a certain choice a hair below zero.
  if (s.entropy < 0) s.entropy = 0;
  return s;
}

ADAPTIVE_K_HD float softmax_score(float logit, const SoftmaxSummary& s) {
  return static_cast<float>(exp(logit - s.max) / s.sum);
}

ADAPTIVE_K_HD float sigmoid_score(float logit) {
  return static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
}

// The order of selection: the larger key first, then the lower index; NaN after everything else.
ADAPTIVE_K_HD bool ranks_before(float key_a, int32_t index_a, float key_b, int32_t index_b) {
  const bool nan_a = key_a != key_a, nan_b = key_b != key_b;
  if (nan_a || nan_b) return nan_a == nan_b ? index_a < index_b : nan_b;
  return key_a == key_b ? index_a < index_b : key_a > key_b;
}

// Puts candidate into the list of the best `size` (at most `limit`) indices; returns the new size.
ADAPTIVE_K_HD int32_t insert_ranked(const float* keys, int32_t candidate, int32_t* best,
                                    int32_t size, int32_t limit) {
  int32_t position = size;
  while (position > 0 &&
         ranks_before(keys[candidate], candidate, keys[best[position - 1]], best[position - 1]))
    --position;
  if (position >= limit) return size;
  if (size < limit) ++size;
  for (int32_t i = size - 1; i > position; --i) best[i] = best[i - 1];
  best[position] = candidate;
  return size;
}

// By what a group of experts is compared: its best choice score for softmax, the sum of its two
// best for sigmoid (the rule of DeepSeek-V3 and Nemotron).
ADAPTIVE_K_HD float group_score(Scoring scoring, const float* keys, int32_t size) {
  int32_t best[2];
  int32_t found = 0;
  for (int32_t e = 0; e < size; ++e) found = insert_ranked(keys, e, best, found, 2);
  if (scoring == Scoring::kSoftmax || found == 1) return keys[best[0]];
  return keys[best[0]] + keys[best[1]];
}

ADAPTIVE_K_HD int32_t clamp_k(int32_t k, int32_t low, int32_t high) {
  k = k < low ? low : k;
  return k > high ? high : k;
}

// What a row that is not of the kind entropy says: its one parameter (p, ratio or share), and the
// least and the most experts. A row of one choice has no parameter: then it runs its k.
ADAPTIVE_K_HD float parameter_of(const PolicyRow& row, float without) {
  return row.num_choices > 1 ? row.thresholds[0] : without;
}
ADAPTIVE_K_HD int32_t k_min_of(const PolicyRow& row) { return row.k_values[0]; }
ADAPTIVE_K_HD int32_t k_max_of(const PolicyRow& row) { return row.k_values[row.num_choices - 1]; }

// Entropy rows: the first choice whose limit lies above the entropy, else the last. A NaN entropy
// is below no limit, so it takes the last.
ADAPTIVE_K_HD int32_t k_by_entropy(const PolicyRow& row, float entropy) {
  int32_t i = 0;
  while (i < row.num_choices - 1 && !(entropy < row.thresholds[i])) ++i;
  return row.k_values[i];
}

// Top-p rows: as few of the ranked scores as reach the share p of the total.
ADAPTIVE_K_HD int32_t k_by_mass(const PolicyRow& row, const float* ranked_scores, int32_t count,
                                double total) {
  const double p = parameter_of(row, 1.0f);
  double mass = 0;
  int32_t k = 0;
  while (k < count && !(mass >= p)) mass += ranked_scores[k++] / total;
  return clamp_k(k, k_min_of(row), k_max_of(row));
}

// Ratio rows: as many experts as have at least that share of the best score.
ADAPTIVE_K_HD int32_t k_by_ratio(const PolicyRow& row, const float* scores, int32_t num_experts) {
  const float ratio = parameter_of(row, 0.0f);
  float best = scores[0];
  for (int32_t e = 1; e < num_experts; ++e) best = scores[e] > best ? scores[e] : best;
  int32_t k = 0;
  for (int32_t e = 0; e < num_experts; ++e) k += scores[e] >= ratio * best;
  return clamp_k(k, k_min_of(row), k_max_of(row));
}

// An expert's contribution: its score times the norm that its output has on average.
ADAPTIVE_K_HD float contribution(float score, int32_t expert, const float* expert_norms) {
  return expert_norms == nullptr ? score : score * expert_norms[expert];
}

// Contribution rows: as few of the ranked experts as reach the share p of what all of them
// contribute. A NaN among the norms reaches no share.
ADAPTIVE_K_HD int32_t k_by_contribution(const PolicyRow& row, const float* expert_norms,
                                        const int32_t* ranked, const float* ranked_scores,
                                        int32_t count) {
  double total = 0;
  for (int32_t i = 0; i < count; ++i)
    total += contribution(ranked_scores[i], ranked[i], expert_norms);
  const double share = static_cast<double>(parameter_of(row, 1.0f)) * total;
  double mass = 0;
  int32_t k = 0;
  while (k < count && !(mass >= share)) {
    mass += contribution(ranked_scores[k], ranked[k], expert_norms);
    ++k;
  }
  return clamp_k(k, k_min_of(row), k_max_of(row));
}

// The decision of k, the same for one thread and for a team of them, in two halves around the
// ranking. A row without a defined softmax (a NaN entropy) runs its full k whatever it decides by.
//
// First half: how many experts to rank. `by_ratio()` is k_by_ratio(), by whoever has the scores.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // by_ratio() of a team runs on the device alone
#endif
template <typename ByRatio>
ADAPTIVE_K_HD int32_t k_to_rank(const PolicyRow& row, float entropy, const ByRatio& by_ratio) {
  const bool defined = entropy == entropy;
  switch (static_cast<PolicyKind>(row.kind)) {
    case PolicyKind::kRatio:
      return defined ? by_ratio() : k_max_of(row);
    case PolicyKind::kTopP:
    case PolicyKind::kContribution:
    case PolicyKind::kSharedPrice:
    case PolicyKind::kSharedExperts:
      return k_max_of(row);
    default:
      return k_by_entropy(row, entropy);
  }
}

// Whether the second half needs the sum of all scores.
ADAPTIVE_K_HD bool needs_total(const PolicyRow& row, float entropy) {
  return entropy == entropy && row.kind == static_cast<int32_t>(PolicyKind::kTopP);
}

// Second half: how many of the k ranked experts run.
ADAPTIVE_K_HD int32_t k_of_ranked(const PolicyRow& row, float entropy, const float* expert_norms,
                                  const int32_t* ranked, const float* ranked_scores, int32_t k,
                                  double total) {
  if (needs_total(row, entropy)) return clamp_k(k_by_mass(row, ranked_scores, k, total), 1, k);
  if (entropy == entropy && row.kind == static_cast<int32_t>(PolicyKind::kContribution))
    return clamp_k(k_by_contribution(row, expert_norms, ranked, ranked_scores, k), 1, k);
  return k;
}

// Turns the selected scores, in place, into the weights of the sum over experts.
ADAPTIVE_K_HD void weigh(const MoeParams& params, float* scores, int32_t k) {
  if (params.norm_topk_prob) {
    float sum = 0;
    for (int32_t i = 0; i < k; ++i) sum += scores[i];
    sum += 1e-20f;
    for (int32_t i = 0; i < k; ++i) scores[i] /= sum;
  }
  for (int32_t i = 0; i < k; ++i) scores[i] *= params.routed_scaling_factor;
}

struct RoutingScratch {
  float* scores;         // [num_experts]
  float* keys;           // [num_experts]
  float* group_keys;     // [n_group], read when n_group > 1
  int32_t* best_groups;  // [topk_group], read when n_group > 1
};

// Routes one token. `correction_bias` and `expert_norms` may be null. `experts` and `weights` have
// room for `capacity` = largest_k(params, num_experts) entries, of which the first k, best first,
// are written. Returns k. With `read` [num_experts], only experts that are marked in it can be
// selected (see sharing.h): then k may be 0.
ADAPTIVE_K_HD int32_t route_token(const MoeParams& params, const float* logits, int32_t num_experts,
                                  const float* correction_bias, const float* expert_norms,
                                  const PolicyRow& row, const RoutingScratch& scratch,
                                  int32_t capacity, int32_t* experts, float* weights,
                                  float* entropy, const uint8_t* read = nullptr) {
  const SoftmaxSummary softmax = summarize_softmax(logits, num_experts);
  *entropy = static_cast<float>(softmax.entropy);

  double total = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    scratch.scores[e] = params.scoring == Scoring::kSoftmax ? softmax_score(logits[e], softmax)
                                                            : sigmoid_score(logits[e]);
    total += scratch.scores[e];
  }
  // The softmax rises strictly with the logit, so ranking by the logit gives the same order without
  // the ties that rounding the probabilities would make.
  const float* keys = logits;
  if (correction_bias != nullptr || params.scoring == Scoring::kSigmoid) {
    for (int32_t e = 0; e < num_experts; ++e)
      scratch.keys[e] = scratch.scores[e] + (correction_bias ? correction_bias[e] : 0.0f);
    keys = scratch.keys;
  }

  int32_t k =
      k_to_rank(row, *entropy, [&] { return k_by_ratio(row, scratch.scores, num_experts); });
  k = clamp_k(k, 1, capacity);

  int32_t selected = 0;
  if (params.n_group > 1) {
    const int32_t group_size = num_experts / params.n_group;
    int32_t kept = 0;
    for (int32_t g = 0; g < params.n_group; ++g) {
      scratch.group_keys[g] = group_score(params.scoring, keys + g * group_size, group_size);
      kept = insert_ranked(scratch.group_keys, g, scratch.best_groups, kept, params.topk_group);
    }
    for (int32_t i = 0; i < kept; ++i) {
      const int32_t first = scratch.best_groups[i] * group_size;
      for (int32_t e = first; e < first + group_size; ++e)
        if (read == nullptr || read[e]) selected = insert_ranked(keys, e, experts, selected, k);
    }
  } else {
    for (int32_t e = 0; e < num_experts; ++e)
      if (read == nullptr || read[e]) selected = insert_ranked(keys, e, experts, selected, k);
  }
  if (read != nullptr) k = selected;

  for (int32_t i = 0; i < selected; ++i) weights[i] = scratch.scores[experts[i]];
  k = k_of_ranked(row, *entropy, expert_norms, experts, weights, k, total);
  weigh(params, weights, k);
  return k;
}

}  // namespace adaptive_k
