// SPDX-License-Identifier: Apache-2.0
// The check of the operator's input shapes that both faces use, so that they say the same.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "operator/moe/params.h"

namespace adaptive_k::cpu {

// One input's shape; -1 is a dimension not yet known, no value is a shape of unknown rank.
using Shape = std::optional<std::vector<int64_t>>;

// A shape as the sentences have it, e.g. "[?, 64]".
inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? ", " : "") + (shape[i] < 0 ? std::string("?") : std::to_string(shape[i]));
  return out + "]";
}

struct InputShapes {
  Shape hidden_states, router_logits, policy_index, policy_kind, thresholds, k_values;
  Shape up, down;  // in values; up is gate_up for the gated activations
  Shape up_scales, down_scales;
  Shape correction_bias, expert_norms;
  bool has_experts = true;  // false: routing alone, no hidden_states, up and down
  bool has_scales = false;
  bool has_correction_bias = false;
  bool has_expert_norms = false;
};

// The sizes that follow; -1 where they are not yet known.
struct Sizes {
  int64_t tokens = -1, hidden = -1, experts = -1, policies = -1, choices = -1, intermediate = -1;
  int64_t group_size = 0;  // of quantised weights; 0: one scale a row, or not yet known
};

// Throws std::invalid_argument with a sentence that names the operator and the input.
Sizes check_shapes(const MoeParams& params, const InputShapes& shapes);

// Throws std::invalid_argument where the kernels here do not read quantised rows of these sizes.
void check_quantised_rows(const MoeParams& params, const Sizes& sizes);

}  // namespace adaptive_k::cpu
