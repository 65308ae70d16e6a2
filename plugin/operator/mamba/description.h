// SPDX-License-Identifier: Apache-2.0
// Mamba2: its attributes, inputs and outputs. T tokens of S sequences, K taps over the channels (x,
// B and C side by side: heads * P + 2 * n_groups * N), P the heads' width, N the state's size.
#pragma once

#include <string>

#include "operator/description.h"
#include "operator/mamba/params.h"
#include "operator/weight_format.h"

namespace adaptive_k {

// In the order of the tables below.
enum class MambaInput : int32_t {
  kConvInput,
  kDt,
  kSubsequenceBegins,
  kPastLens,
  kStateSlots,
  kConvWeight,
  kConvBias,
  kA,
  kD,
  kDtBias,
  kConvState,
  kSsmState,
  kCount,
};
enum class MambaOutput : int32_t { kY, kPresentConvState, kPresentSsmState };

struct Mamba {
  using Params = MambaParams;
  using Input = MambaInput;

  static constexpr const char* kName = "Mamba2";

  static constexpr Attribute<MambaParams> kAttributes[] = {
      attribute<&MambaParams::n_groups>("n_groups"),
      attribute<&MambaParams::dt_min>("dt_min"),
      attribute<&MambaParams::dt_max>("dt_max"),
  };

  static constexpr Tensor kInputs[] = {
      {"conv_input", "T, channels"},
      {"dt", "T, heads"},
      {"subsequence_begins", "S+1", TypeRule::kInt32},
      {"past_lens", "S", TypeRule::kInt32},
      {"state_slots", "S", TypeRule::kInt32},
      {"conv_weight", "K, channels", TypeRule::kFloat32},
      {"conv_bias", "channels", TypeRule::kFloat32},
      {"A", "heads", TypeRule::kFloat32},
      {"D", "heads", TypeRule::kFloat32},
      {"dt_bias", "heads", TypeRule::kFloat32},
      {"conv_state", "slots, K-1, channels"},
      {"ssm_state", "slots, heads, N, P", TypeRule::kFloat32},
  };

  // A target that updates the states in place makes the first one only.
  static constexpr Tensor kOutputs[] = {
      {"y", "T, heads*P"},
      {"present_conv_state", "slots, K-1, channels"},
      {"present_ssm_state", "slots, heads, N, P", TypeRule::kFloat32},
  };

  static WeightFormat weight_format(const MambaParams&) { return WeightFormat::kAsHiddenStates; }
  static bool gated(const MambaParams&) { return false; }
  static bool partial(const MambaParams&) { return false; }
  static bool present(const MambaParams&, Presence presence) {
    return presence == Presence::kAlways;
  }
  static std::string why_so_many(const MambaParams&) { return ""; }
  static const char* wrong_attributes(const MambaParams& params) {
    return check_attributes(params, /*heads=*/0);
  }
};

static_assert(sizeof(Mamba::kInputs) / sizeof(Tensor) == static_cast<size_t>(MambaInput::kCount),
              "each input stands in the table and has its name");

}  // namespace adaptive_k
