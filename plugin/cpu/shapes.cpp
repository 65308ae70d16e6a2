// SPDX-License-Identifier: Apache-2.0
#include "shapes.h"

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

  const Sizes sizes{b.value('T'), b.value('H'), b.value('E'),
                    b.value('P'), b.value('C'), b.value('I')};
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
  return sizes;
}

}  // namespace adaptive_k::cpu
