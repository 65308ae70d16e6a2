// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe: its attributes, inputs and outputs. T tokens, H their hidden size, E experts, I
// their intermediate size, P policies of C choices. With first_expert, weights are of W experts.
#pragma once

#include <string>

#include "operator/description.h"
#include "operator/moe/params.h"
#include "operator/table.h"

namespace adaptive_k {

// In the order of the tables below.
enum class MoeInput : int32_t {
  kHiddenStates,
  kRouterLogits,
  kPolicyIndex,
  kPolicyKind,
  kThresholds,
  kKValues,
  kUp,
  kDown,
  kCorrectionBias,
  kUpScales,
  kDownScales,
  kExpertNorms,
  kCount,
};
enum class MoeOutput : int32_t { kOutput, kK, kEntropy, kExpertLoad };

struct Moe {
  using Params = MoeParams;
  using Input = MoeInput;

  static constexpr const char* kName = "AdaptiveKMoe";

  static constexpr Attribute<MoeParams> kAttributes[] = {
      attribute<&MoeParams::activation>("activation"),
      attribute<&MoeParams::scoring>("scoring"),
      attribute<&MoeParams::norm_topk_prob>("norm_topk_prob"),
      attribute<&MoeParams::routed_scaling_factor>("routed_scaling_factor"),
      attribute<&MoeParams::n_group>("n_group"),
      attribute<&MoeParams::topk_group>("topk_group"),
      attribute<&MoeParams::max_k>("max_k"),
      attribute<&MoeParams::weight_format>("weight_format"),
      attribute<&MoeParams::activation_format>("activation_format"),
      attribute<&MoeParams::first_expert>("first_expert"),
      attribute<&MoeParams::has_expert_norms>("has_expert_norms"),
  };

  static constexpr Tensor kInputs[] = {
      {"hidden_states", "T, H"},
      {"router_logits", "T, E", TypeRule::kFloat32},
      {"policy_index", "T", TypeRule::kInt32},
      {"policy_kind", "P", TypeRule::kInt32},
      {"thresholds", "P, C-1", TypeRule::kFloat32},
      {"k_values", "P, C", TypeRule::kInt32},
      {"up", "E, I, H", TypeRule::kWeights, Presence::kAlways, "gate_up", "E, 2I, H"},
      {"down", "E, H, I", TypeRule::kWeights},
      {"correction_bias", "E", TypeRule::kFloat32, Presence::kIfGiven},
      {"up_scales", "E, I, H/group", TypeRule::kElement, Presence::kIfQuantised, "gate_up_scales",
       "E, 2I, H/group"},
      {"down_scales", "E, H, I/group", TypeRule::kElement, Presence::kIfQuantised},
      {"expert_norms", "E", TypeRule::kFloat32, Presence::kIfExpertNorms},
  };

  static constexpr Tensor kOutputs[] = {
      {"output", "T, H"},
      {"k", "T", TypeRule::kInt32},
      {"entropy", "T", TypeRule::kFloat32},
      {"expert_load", "E", TypeRule::kInt32},
  };

  static WeightFormat weight_format(const MoeParams& params) { return params.weight_format; }
  static bool gated(const MoeParams& params) { return is_gated(params.activation); }
  static bool partial(const MoeParams& params) { return params.first_expert != -1; }

  // Whether an input is there; one that only the number of inputs tells of is not.
  static bool present(const MoeParams& params, Presence presence) {
    return presence == Presence::kAlways ||
           (presence == Presence::kIfQuantised && is_quantised(params.weight_format)) ||
           (presence == Presence::kIfExpertNorms && params.has_expert_norms);
  }

  // The attributes that make the number of inputs what it is, for the sentence about it.
  static std::string why_so_many(const MoeParams& params) {
    const WeightFormat format = params.weight_format;
    return (is_quantised(format) ? std::string(" (weight_format ") + spelling(format) + ")" : "") +
           (params.has_expert_norms ? " (has_expert_norms)" : "");
  }

  // Why there is no such layer, or nullptr.
  static const char* wrong_attributes(const MoeParams& params) {
    return check_attributes(params, /*num_experts=*/0);
  }
};

static_assert(sizeof(Moe::kInputs) / sizeof(Tensor) == static_cast<size_t>(MoeInput::kCount),
              "each input stands in the table and has its name");

}  // namespace adaptive_k
