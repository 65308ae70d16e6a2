// SPDX-License-Identifier: Apache-2.0
// The attributes of AdaptiveKMoe and what is known of their values, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "operator/description.h"
#include "operator/host_device.h"
#include "operator/weight_format.h"

namespace adaptive_k {

// What an expert does between its two projections. In the gated ones, the first I rows of gate_up
// are the gate and the other I rows are the up-projection.
enum class Activation : int32_t {
  kSwiglu,    // silu(gate) * up
  kGeglu,     // gelu(gate) * up, gelu by erf
  kSilu,      // silu(up)
  kGelu,      // gelu(up), by erf
  kGeluTanh,  // gelu(up), by the tanh approximation
  kRelu,      // max(up, 0)
  kRelu2,     // max(up, 0)^2
};

enum class Scoring : int32_t { kSoftmax, kSigmoid };

// What a policy row decides k by.
enum class PolicyKind : int32_t {
  kEntropy = 0,
  kTopP = 1,
  kRatio = 2,
  kContribution = 3,
  kSharedPrice = 4,    // sharing.h; the parameter is the price of reading an expert
  kSharedExperts = 5,  // sharing.h; the parameter is how many experts the row adds to a step
};

// Whether a row's tokens choose among what the whole step reads.
ADAPTIVE_K_HD bool is_sharing(int32_t kind) {
  return kind == static_cast<int32_t>(PolicyKind::kSharedPrice) ||
         kind == static_cast<int32_t>(PolicyKind::kSharedExperts);
}

// The most experts that a policy may name and that a GPU runs for a token; also the largest k where
// max_k is left at 0 (and the model has that many experts).
constexpr int32_t kMaxK = 32;
// The largest max_k that the attribute may be; CPUs run it.
constexpr int32_t kMaxKAttribute = 1024;
// The most experts of a layer on a GPU.
constexpr int32_t kMaxExpertsOnGpu = 512;

struct MoeParams {
  Activation activation = Activation::kSwiglu;
  Scoring scoring = Scoring::kSoftmax;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1.0f;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  int32_t max_k = 0;  // 0: min(num_experts, kMaxK)
  WeightFormat weight_format = WeightFormat::kAsHiddenStates;
  ActivationFormat activation_format = ActivationFormat::kAsHiddenStates;
  // -1: the weights are those of all experts. Else of the range of experts that begins here
  // (expert parallel): decisions are over all experts, products over the range alone, and the
  // output is its part of the sum.
  int32_t first_expert = -1;
  bool has_expert_norms = false;  // which of the optional inputs the last one is
};

// The experts whose products a call computes.
struct ExpertRange {
  int32_t first;
  int32_t count;
};

ADAPTIVE_K_HD bool is_in(const ExpertRange& range, int32_t expert) {
  return expert >= range.first && expert - range.first < range.count;
}

ADAPTIVE_K_HD ExpertRange expert_range(const MoeParams& params, int32_t num_experts,
                                       int32_t local_experts) {
  return params.first_expert < 0 ? ExpertRange{0, num_experts}
                                 : ExpertRange{params.first_expert, local_experts};
}

ADAPTIVE_K_HD constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGeglu;
}

// The number of experts that a token may select at most: max_k, capped by what the groups leave.
ADAPTIVE_K_HD int32_t largest_k(const MoeParams& params, int32_t num_experts) {
  int32_t limit = params.max_k > 0 ? params.max_k : kMaxK;
  const int32_t selectable =
      params.n_group > 1 ? num_experts / params.n_group * params.topk_group : num_experts;
  return limit < selectable ? limit : selectable;
}

constexpr Word kActivationWords[] = {
    {"swiglu", static_cast<int32_t>(Activation::kSwiglu)},
    {"geglu", static_cast<int32_t>(Activation::kGeglu)},
    {"silu", static_cast<int32_t>(Activation::kSilu)},
    {"gelu", static_cast<int32_t>(Activation::kGelu)},
    {"gelu_tanh", static_cast<int32_t>(Activation::kGeluTanh)},
    {"relu", static_cast<int32_t>(Activation::kRelu)},
    {"relu2", static_cast<int32_t>(Activation::kRelu2)},
};
constexpr Word kScoringWords[] = {
    {"softmax", static_cast<int32_t>(Scoring::kSoftmax)},
    {"sigmoid", static_cast<int32_t>(Scoring::kSigmoid)},
};
constexpr Word kPolicyKindWords[] = {
    {"entropy", static_cast<int32_t>(PolicyKind::kEntropy)},
    {"top_p", static_cast<int32_t>(PolicyKind::kTopP)},
    {"ratio", static_cast<int32_t>(PolicyKind::kRatio)},
    {"contribution", static_cast<int32_t>(PolicyKind::kContribution)},
    {"shared_price", static_cast<int32_t>(PolicyKind::kSharedPrice)},
    {"shared_experts", static_cast<int32_t>(PolicyKind::kSharedExperts)},
};
constexpr WordList words_of(Activation) { return kActivationWords; }
constexpr WordList words_of(Scoring) { return kScoringWords; }
constexpr WordList words_of(PolicyKind) { return kPolicyKindWords; }

// Returns nullptr when the numeric attributes fit a model of num_experts experts (0: not known
// yet), else the sentence that says what is wrong.
inline const char* check_attributes(const MoeParams& params, int32_t num_experts) {
  if (params.max_k < 0) return "max_k must be 0 (the default) or positive";
  if (params.max_k > kMaxKAttribute) return "max_k must be at most 1024";
  if (params.n_group < 1) return "n_group must be at least 1";
  if (params.topk_group < 1 || params.topk_group > params.n_group)
    return "topk_group must be between 1 and n_group";
  if (num_experts > 0 && num_experts % params.n_group != 0)
    return "n_group must divide the number of experts";
  if (params.activation_format != ActivationFormat::kAsHiddenStates &&
      !is_quantised(params.weight_format))
    return "activation_format must be empty unless weight_format is int8 or int4";
  if (params.first_expert < -1)
    return "first_expert must be -1 (the weights of all experts) or the index of an expert";
  if (num_experts > 0 && params.first_expert >= num_experts)
    return "first_expert must be less than the number of experts";
  if (!std::isfinite(params.routed_scaling_factor))
    return "routed_scaling_factor is not a finite number";
  return nullptr;
}

}  // namespace adaptive_k
