// SPDX-License-Identifier: Apache-2.0
#include "operator/moe/shapes.h"

#include <stdexcept>
#include <string>

namespace adaptive_k {
namespace {

[[noreturn]] void fail(const std::string& sentence) { throw std::invalid_argument(sentence); }

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
int64_t group_size(const MoeParams& params, const Shapes<Moe>& shapes) {
  const auto size_of = [&](MoeInput scales, MoeInput weights) {
    const auto s = static_cast<int32_t>(scales), w = static_cast<int32_t>(weights);
    return group_size_of(input_name<Moe>(params, s), shapes[s], input_name<Moe>(params, w),
                         shapes[w]);
  };
  const int64_t up = size_of(MoeInput::kUpScales, MoeInput::kUp);
  const int64_t down = size_of(MoeInput::kDownScales, MoeInput::kDown);
  if (up < 0 || down < 0) return 0;
  const Shape& up_scales = shapes[static_cast<int32_t>(MoeInput::kUpScales)];
  const Shape& down_scales = shapes[static_cast<int32_t>(MoeInput::kDownScales)];
  if (up_scales->back() == 1 && down_scales->back() == 1) return 0;
  if (up != down)
    fail("inputs " +
         std::string(input_name<Moe>(params, static_cast<int32_t>(MoeInput::kUpScales))) +
         " and down_scales make groups of " + std::to_string(up) + " and " + std::to_string(down) +
         " values but must make groups of one size, or have one scale a row each");
  return up;
}

}  // namespace

MoeSizes check_shapes(const MoeParams& params, const Shapes<Moe>& shapes) {
  const Binder b = bind_shapes<Moe>(params, shapes);
  MoeSizes sizes{b.value("T"),
                 b.value("H"),
                 b.value("E"),
                 b.value("P"),
                 b.value("C"),
                 b.value("I"),
                 b.value(Moe::partial(params) ? "W" : "E")};
  if (sizes.policies == 0) fail("input policy_kind has no rows; at least one policy is needed");
  if (sizes.choices == 0) fail("input k_values has no columns; at least one choice is needed");
  if (sizes.experts == 0) fail("input router_logits has no columns; at least one expert is needed");
  if (sizes.hidden == 0 || sizes.intermediate == 0)
    fail("input down has an empty dimension; hidden and intermediate size must be positive");
  const int32_t experts = sizes.experts < 0 ? 0 : static_cast<int32_t>(sizes.experts);
  if (const char* wrong = check_attributes(params, experts))
    fail(std::string("attribute ") + wrong + " (" + describe<Moe>(params) +
         (experts ? ", " + std::to_string(experts) + " experts" : "") + ")");
  if (Moe::partial(params) && sizes.local_experts == 0)
    fail("input down has no experts; with first_expert there must be at least one");
  if (experts > 0 && params.first_expert + sizes.local_experts > experts)
    fail("attribute first_expert is " + std::to_string(params.first_expert) +
         ", from where on the weights of " + std::to_string(sizes.local_experts) +
         " experts are given, but there are " + std::to_string(experts) +
         " by input router_logits");
  sizes.group_size = group_size(params, shapes);
  return sizes;
}

void check_cpu_weights(const MoeParams& params, const MoeSizes& sizes) {
  const WeightFormat format = params.weight_format;
  if (!on_cpus(format)) {
    std::string others;
    for (const Word& w : kWeightFormatWords)
      if (*w.word && on_cpus(static_cast<WeightFormat>(w.value)))
        others += (others.empty() ? "" : ", ") + std::string(w.word);
    fail(std::string("attribute weight_format is '") + spelling(format) +
         "', which CPUs do not compute: use one of " + others);
  }
  if (!is_quantised(format)) return;
  for (const int64_t size : {sizes.hidden, sizes.intermediate})
    if (size % row_multiple(format) != 0 && size >= 0)
      fail("hidden and intermediate size must be multiples of " +
           std::to_string(row_multiple(format)) + " for " + spelling(format) +
           " weights, but one is " + std::to_string(size));
  if (sizes.group_size % kGroupMultiple != 0)
    fail("the scales make groups of " + std::to_string(sizes.group_size) +
         " values but must make groups of a multiple of " + std::to_string(kGroupMultiple) +
         ", or of whole rows");
}

}  // namespace adaptive_k
