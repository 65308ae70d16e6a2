// SPDX-License-Identifier: Apache-2.0
// The CPU operator for Python: arrays in, arrays filled. The package's __init__.py checks types and
// allocates the outputs.
#include "python/mamba/bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/moe/compute.h"
#include "cpu/moe/kernels/kernels.h"
#include "operator/moe/shapes.h"
#include "python/threads.h"

namespace nb = nanobind;
namespace ak = adaptive_k;
namespace cpu = adaptive_k::cpu;

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using IntegersOut = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;

template <typename Enum>
void parse(const char* name, const std::string& word, const char* choices, Enum* value) {
  if (!ak::parse(word.c_str(), value))
    throw std::invalid_argument("AdaptiveKMoe: attribute " + std::string(name) + " is '" + word +
                                "' but must be one of " + choices);
}

ak::MoeParams parse_params(const std::string& activation, const std::string& scoring,
                           const std::string& weight_format, bool norm_topk_prob,
                           float routed_scaling_factor, int n_group, int topk_group, int max_k) {
  ak::MoeParams params;
  parse("activation", activation, ak::kActivationChoices, &params.activation);
  parse("scoring", scoring, ak::kScoringChoices, &params.scoring);
  parse("weight_format", weight_format, ak::kWeightFormatChoices, &params.weight_format);
  params.norm_topk_prob = norm_topk_prob;
  params.routed_scaling_factor = routed_scaling_factor;
  params.n_group = n_group;
  params.topk_group = topk_group;
  params.max_k = max_k;
  return params;
}

template <typename Array>
cpu::Shape shape_of(const Array& array) {
  std::vector<int64_t> shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
  return shape;
}

// A weight's shape in values, of which int4 has two in an element.
cpu::Shape weight_shape(const Weights& array, ak::WeightFormat format) {
  cpu::Shape shape = shape_of(array);
  if (format == ak::WeightFormat::kInt4 && !shape->empty()) shape->back() *= 2;
  return shape;
}

cpu::RoutingArguments routing_arguments(const cpu::Sizes& sizes, const Floats& router_logits,
                                        const Integers& policy_index, const Integers& policy_kind,
                                        const Floats& thresholds, const Integers& k_values,
                                        const std::optional<Floats>& correction_bias,
                                        const std::optional<Floats>& expert_norms) {
  cpu::RoutingArguments r;
  r.tokens = sizes.tokens;
  r.experts = static_cast<int32_t>(sizes.experts);
  r.policies = static_cast<int32_t>(sizes.policies);
  r.choices = static_cast<int32_t>(sizes.choices);
  r.router_logits = router_logits.data();
  r.policy_index = policy_index.data();
  r.policy_kind = policy_kind.data();
  r.thresholds = thresholds.data();
  r.k_values = k_values.data();
  r.correction_bias = correction_bias ? correction_bias->data() : nullptr;
  r.expert_norms = expert_norms ? expert_norms->data() : nullptr;
  return r;
}

cpu::InputShapes routing_shapes(const Floats& router_logits, const Integers& policy_index,
                                const Integers& policy_kind, const Floats& thresholds,
                                const Integers& k_values,
                                const std::optional<Floats>& correction_bias,
                                const std::optional<Floats>& expert_norms) {
  cpu::InputShapes s;
  s.router_logits = shape_of(router_logits);
  s.policy_index = shape_of(policy_index);
  s.policy_kind = shape_of(policy_kind);
  s.thresholds = shape_of(thresholds);
  s.k_values = shape_of(k_values);
  s.has_correction_bias = correction_bias.has_value();
  if (correction_bias) s.correction_bias = shape_of(*correction_bias);
  s.has_expert_norms = expert_norms.has_value();
  if (expert_norms) s.expert_norms = shape_of(*expert_norms);
  return s;
}

// The sizes [tokens, capacity] of route's expert lists, once the inputs are known to fit.
std::pair<int64_t, int32_t> routing_size(const ak::MoeParams& params, const Floats& router_logits,
                                         const Integers& policy_index, const Integers& policy_kind,
                                         const Floats& thresholds, const Integers& k_values,
                                         const std::optional<Floats>& correction_bias,
                                         const std::optional<Floats>& expert_norms) {
  cpu::InputShapes s = routing_shapes(router_logits, policy_index, policy_kind, thresholds,
                                      k_values, correction_bias, expert_norms);
  s.has_experts = false;
  const cpu::Sizes sizes = cpu::check_shapes(params, s);
  return {sizes.tokens, ak::largest_k(params, static_cast<int32_t>(sizes.experts))};
}

void require_room(bool fits) {
  if (!fits) throw std::invalid_argument("AdaptiveKMoe: an output array has the wrong size");
}

}  // namespace

NB_MODULE(_plugin, m) {
  m.doc() = "The CPU operator. Use it through the package, which checks types.";

  bind_mamba(m);

  nb::class_<ak::MoeParams>(m, "MoeParams");
  m.def("parse_params", &parse_params, nb::kw_only(), nb::arg("activation"), nb::arg("scoring"),
        nb::arg("weight_format"), nb::arg("norm_topk_prob"), nb::arg("routed_scaling_factor"),
        nb::arg("n_group"), nb::arg("topk_group"), nb::arg("max_k"));
  m.def("instruction_set", &cpu::instruction_set);
  m.def(
      "routing_width",
      [](const ak::MoeParams& params, const Floats& router_logits, const Integers& policy_index,
         const Integers& policy_kind, const Floats& thresholds, const Integers& k_values,
         const std::optional<Floats>& correction_bias, const std::optional<Floats>& expert_norms) {
        return routing_size(params, router_logits, policy_index, policy_kind, thresholds, k_values,
                            correction_bias, expert_norms)
            .second;
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
      nb::arg().none());

  m.def(
      "route",
      [](const ak::MoeParams& params, const Floats& router_logits, const Integers& policy_index,
         const Integers& policy_kind, const Floats& thresholds, const Integers& k_values,
         const std::optional<Floats>& correction_bias, const std::optional<Floats>& expert_norms,
         const IntegersOut& k, const FloatsOut& entropy, const IntegersOut& experts,
         const FloatsOut& weights) {
        cpu::InputShapes s = routing_shapes(router_logits, policy_index, policy_kind, thresholds,
                                            k_values, correction_bias, expert_norms);
        s.has_experts = false;
        const cpu::Sizes sizes = cpu::check_shapes(params, s);
        const size_t tokens = sizes.tokens;
        const size_t room = tokens * ak::largest_k(params, static_cast<int32_t>(sizes.experts));
        require_room(k.size() == tokens && entropy.size() == tokens && experts.size() == room &&
                     weights.size() == room);
        const cpu::RoutingArguments arguments =
            routing_arguments(sizes, router_logits, policy_index, policy_kind, thresholds, k_values,
                              correction_bias, expert_norms);
        const nb::gil_scoped_release release;
        cpu::route(params, arguments, k.data(), entropy.data(), experts.data(), weights.data());
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
      nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg());

  m.def(
      "moe",
      [](const ak::MoeParams& params, const Floats& hidden_states, const Floats& router_logits,
         const Integers& policy_index, const Integers& policy_kind, const Floats& thresholds,
         const Integers& k_values, const Weights& up, const Weights& down,
         const std::optional<Floats>& up_scales, const std::optional<Floats>& down_scales,
         const std::optional<Floats>& correction_bias, const std::optional<Floats>& expert_norms,
         std::optional<int> num_threads, const FloatsOut& output, const IntegersOut& k,
         const FloatsOut& entropy) {
        cpu::InputShapes s = routing_shapes(router_logits, policy_index, policy_kind, thresholds,
                                            k_values, correction_bias, expert_norms);
        s.hidden_states = shape_of(hidden_states);
        s.up = weight_shape(up, params.weight_format);
        s.down = weight_shape(down, params.weight_format);
        s.has_scales = up_scales && down_scales;
        if (s.has_scales) {
          s.up_scales = shape_of(*up_scales);
          s.down_scales = shape_of(*down_scales);
        }
        const cpu::Sizes sizes = cpu::check_shapes(params, s);
        cpu::check_quantised_rows(params, sizes);
        const size_t tokens = sizes.tokens;
        require_room(output.size() == tokens * sizes.hidden && k.size() == tokens &&
                     entropy.size() == tokens);
        const cpu::RoutingArguments routing =
            routing_arguments(sizes, router_logits, policy_index, policy_kind, thresholds, k_values,
                              correction_bias, expert_norms);
        cpu::ExpertArguments experts;
        experts.hidden = sizes.hidden;
        experts.intermediate = sizes.intermediate;
        experts.hidden_states = hidden_states.data();
        experts.up = up.data();
        experts.down = down.data();
        if (s.has_scales) {
          experts.up_scales = up_scales->data();
          experts.down_scales = down_scales->data();
          experts.group_size = sizes.group_size;
        }
        const nb::gil_scoped_release release;
        run_with_threads(num_threads, [&] {
          cpu::moe(params, routing, experts, output.data(), k.data(), entropy.data());
        });
      },
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
      nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
      nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
}
