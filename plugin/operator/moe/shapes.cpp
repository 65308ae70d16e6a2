// SPDX-License-Identifier: Apache-2.0
#include "operator/moe/shapes.h"

#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>

namespace adaptive_k::cpu {
namespace {

[[noreturn]] void fail(const std::string& sentence) {
  throw std::invalid_argument("AdaptiveKMoe: " + sentence);
}

// A dimension that must be factor * symbol + offset.
struct Dimension {
  char symbol;
  int factor;
  int offset;

  std::string text() const {
    return (factor == 1 ? "" : std::to_string(factor)) + symbol +
           (offset == 0 ? "" : std::to_string(offset));
  }
};

// Learns the value of each symbol from the first input that has it and holds the others to it.
class Binder {
 public:
  void bind(const std::string& name, const Shape& shape,
            std::initializer_list<Dimension> expected) {
    if (!shape) return;
    std::string pattern;
    for (const Dimension& d : expected) pattern += (pattern.empty() ? "" : ", ") + d.text();
    const std::string must =
        "input " + name + " has shape " + shape_text(*shape) + " but must be [" + pattern + "]";
    if (shape->size() != expected.size()) fail(must);
    size_t axis = 0;
    for (const Dimension& d : expected) {
      const int64_t size = (*shape)[axis++];
      if (size < 0) continue;
      const auto known = values_.find(d.symbol);
      if (known != values_.end()) {
        if (size != known->second.value * d.factor + d.offset)
          fail(must + ", where " + d.symbol + " = " + std::to_string(known->second.value) +
               " by input " + known->second.input);
      } else if ((size - d.offset) % d.factor != 0) {
        fail(must + ", so dimension " + std::to_string(axis - 1) + " must be even");
      } else {
        values_[d.symbol] = {(size - d.offset) / d.factor, name};
      }
    }
  }

  int64_t value(char symbol) const {
    const auto known = values_.find(symbol);
    return known == values_.end() ? -1 : known->second.value;
  }

 private:
  struct Known {
    int64_t value;
    std::string input;
  };
  std::map<char, Known> values_;
};

// Scales are [E, N, groups] beside weights of [E, N, K]. Returns the group size, or -1 while the
// sizes are not known.
int64_t group_size_of(const std::string& name, const Shape& scales, const std::string& weights_name,
                      const Shape& weights) {
  if (!scales || !weights) return -1;
  const std::string must = "input " + name + " has shape " + shape_text(*scales) +
                           " but must be [E, N, groups] beside " + weights_name +
                           " [E, N, K] = " + shape_text(*weights);
  if (scales->size() != 3 || weights->size() != 3) fail(must);
  for (size_t i = 0; i < 2; ++i)
    if ((*scales)[i] >= 0 && (*weights)[i] >= 0 && (*scales)[i] != (*weights)[i]) fail(must);
  const int64_t groups = (*scales)[2], length = (*weights)[2];
  if (groups < 0 || length < 0) return -1;
  if (groups == 0 || length % groups != 0) fail(must + ", where groups divides K");
  return length / groups;
}

// The one group size of both scale inputs, 0 for one scale a row or while it is not known.
int64_t group_size(const MoeParams& params, const InputShapes& s) {
  const std::string up_name = is_gated(params.activation) ? "gate_up" : "up";
  const int64_t up = group_size_of(up_name + "_scales", s.up_scales, up_name, s.up);
  const int64_t down = group_size_of("down_scales", s.down_scales, "down", s.down);
  if (up < 0 || down < 0) return 0;
  const bool whole_rows = s.up_scales->back() == 1 && s.down_scales->back() == 1;
  if (whole_rows) return 0;
  if (up != down)
    fail("inputs " + up_name + "_scales and down_scales make groups of " + std::to_string(up) +
         " and " + std::to_string(down) +
         " values but must make groups of one size, or have one scale a row each");
  return up;
}

}  // namespace

Sizes check_shapes(const MoeParams& params, const InputShapes& s) {
  Binder b;
  const Dimension T{'T', 1, 0}, H{'H', 1, 0}, E{'E', 1, 0}, P{'P', 1, 0}, C{'C', 1, 0},
      I{'I', 1, 0};
  if (s.has_experts) b.bind("hidden_states", s.hidden_states, {T, H});
  b.bind("router_logits", s.router_logits, {T, E});
  b.bind("policy_index", s.policy_index, {T});
  b.bind("policy_kind", s.policy_kind, {P});
  b.bind("k_values", s.k_values, {P, C});
  b.bind("thresholds", s.thresholds, {P, Dimension{'C', 1, -1}});
  if (s.has_experts) {
    if (is_gated(params.activation))
      b.bind("gate_up", s.up, {E, Dimension{'I', 2, 0}, H});
    else
      b.bind("up", s.up, {E, I, H});
    b.bind("down", s.down, {E, H, I});
  }
  if (s.has_correction_bias) b.bind("correction_bias", s.correction_bias, {E});
  if (s.has_expert_norms) b.bind("expert_norms", s.expert_norms, {E});

  Sizes sizes{b.value('T'), b.value('H'), b.value('E'), b.value('P'), b.value('C'), b.value('I')};
  if (sizes.policies == 0) fail("input policy_kind has no rows; at least one policy is needed");
  if (sizes.choices == 0) fail("input k_values has no columns; at least one choice is needed");
  if (sizes.experts == 0) fail("input router_logits has no columns; at least one expert is needed");
  if (sizes.hidden == 0 || sizes.intermediate == 0)
    fail("input down has an empty dimension; hidden and intermediate size must be positive");
  const int32_t experts = sizes.experts < 0 ? 0 : static_cast<int32_t>(sizes.experts);
  if (const char* wrong = check_attributes(params, experts))
    fail(std::string("attribute ") + wrong +
         (experts ? " (n_group " + std::to_string(params.n_group) + ", topk_group " +
                        std::to_string(params.topk_group) + ", max_k " +
                        std::to_string(params.max_k) + ", " + std::to_string(experts) + " experts)"
                  : ""));
  if (s.has_scales) sizes.group_size = group_size(params, s);
  return sizes;
}

void check_quantised_rows(const MoeParams& params, const Sizes& sizes) {
  if (!is_quantised(params.weight_format)) return;
  const int64_t multiple = params.weight_format == WeightFormat::kInt8 ? 16 : 32;
  for (const int64_t size : {sizes.hidden, sizes.intermediate})
    if (size % multiple != 0 && size >= 0)
      fail("hidden and intermediate size must be multiples of " + std::to_string(multiple) +
           " for int" + std::to_string(bits_of(params.weight_format)) + " weights, but one is " +
           std::to_string(size));
  if (sizes.group_size % 32 != 0)
    fail("the scales make groups of " + std::to_string(sizes.group_size) +
         " values but must make groups of a multiple of 32, or of whole rows");
}

}  // namespace adaptive_k::cpu
