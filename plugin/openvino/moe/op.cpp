// SPDX-License-Identifier: Apache-2.0
#include "openvino/moe/op.h"

#include <stdexcept>
#include <utility>

#include "cpu/moe/compute.h"
#include "operator/moe/shapes.h"

namespace adaptive_k::openvino {
namespace {

enum Input : size_t {
  kHiddenStates,
  kRouterLogits,
  kPolicyIndex,
  kPolicyKind,
  kThresholds,
  kKValues,
  kUp,
  kDown,
  kNumRequired,
};

// Where the optional inputs are, 0 where not: correction_bias, then the scales of quantised
// weights, expert_norms and expert_load. Their number and the attributes tell which there are.
struct OptionalInputs {
  size_t correction_bias = 0, up_scales = 0, down_scales = 0, expert_norms = 0, expert_load = 0;

  OptionalInputs(size_t count, const MoeParams& params, const Attributes& attributes) {
    size_t next = kNumRequired;
    if (count > fewest(params, attributes)) correction_bias = next++;
    if (is_quantised(params.weight_format)) {
      up_scales = next++;
      down_scales = next++;
    }
    if (attributes.has_expert_norms != 0) expert_norms = next++;
    if (attributes.has_expert_load != 0) expert_load = next++;
  }

  // Inputs that there are without correction_bias.
  static size_t fewest(const MoeParams& params, const Attributes& attributes) {
    return kNumRequired + (is_quantised(params.weight_format) ? 2 : 0) +
           (attributes.has_expert_norms != 0) + (attributes.has_expert_load != 0);
  }
};

const char* input_name(size_t index, bool gated, const OptionalInputs& optional) {
  constexpr const char* kNames[] = {"hidden_states", "router_logits", "policy_index", "policy_kind",
                                    "thresholds",    "k_values",      "up",           "down"};
  if (index == kUp && gated) return "gate_up";
  if (index < kNumRequired) return kNames[index];
  if (index == optional.expert_load) return "expert_load";
  if (index == optional.down_scales) return "down_scales";
  if (index == optional.up_scales) return gated ? "gate_up_scales" : "up_scales";
  return index == optional.expert_norms ? "expert_norms" : "correction_bias";
}

template <typename Enum>
void parse_attribute(const ov::Node* node, const char* name, const std::string& word,
                     const char* choices, Enum* value) {
  NODE_VALIDATION_CHECK(node, parse(word.c_str(), value), "AdaptiveKMoe: attribute ", name, " is '",
                        word, "' but must be one of ", choices);
}

MoeParams parse_attributes(const ov::Node* node, const Attributes& a) {
  MoeParams params;
  parse_attribute(node, "activation", a.activation, kActivationChoices, &params.activation);
  parse_attribute(node, "scoring", a.scoring, kScoringChoices, &params.scoring);
  parse_attribute(node, "weight_format", a.weight_format, kWeightFormatChoices,
                  &params.weight_format);
  params.norm_topk_prob = a.norm_topk_prob != 0;
  params.routed_scaling_factor = a.routed_scaling_factor;
  params.n_group = static_cast<int32_t>(a.n_group);
  params.topk_group = static_cast<int32_t>(a.topk_group);
  params.max_k = static_cast<int32_t>(a.max_k);
  return params;
}

cpu::Shape shape_of(const ov::PartialShape& shape) {
  if (shape.rank().is_dynamic()) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const ov::Dimension& d : shape) sizes.push_back(d.is_static() ? d.get_length() : -1);
  return sizes;
}

// The type that a weight has in a model. One of bfloat16 travels as bytes: OpenVINO's CPU plugin
// widens constants of 16-bit types (u16 among them) that feed a custom operator, and leaves u8
// alone.
ov::element::Type weight_type(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return ov::element::f32;
    case WeightFormat::kBFloat16:
      return ov::element::u8;
    case WeightFormat::kInt8:
    case WeightFormat::kInt4:
      return ov::element::i8;
  }
  return ov::element::dynamic;
}

// A weight's shape in values, given that of a tensor in which a value may be two elements or half
// of one.
cpu::Shape weight_shape(cpu::Shape shape, const ov::element::Type& type, WeightFormat format) {
  if (shape && !shape->empty() && shape->back() > 0 && type.is_static())
    shape->back() = shape->back() * static_cast<int64_t>(type.bitwidth()) / bits_of(format);
  return shape;
}

template <typename ShapeOf>
cpu::InputShapes input_shapes(const OptionalInputs& optional, const ShapeOf& shape) {
  cpu::InputShapes s;
  s.hidden_states = shape(kHiddenStates);
  s.router_logits = shape(kRouterLogits);
  s.policy_index = shape(kPolicyIndex);
  s.policy_kind = shape(kPolicyKind);
  s.thresholds = shape(kThresholds);
  s.k_values = shape(kKValues);
  s.up = shape(kUp);
  s.down = shape(kDown);
  s.has_scales = optional.up_scales != 0;
  if (s.has_scales) {
    s.up_scales = shape(optional.up_scales);
    s.down_scales = shape(optional.down_scales);
  }
  s.has_correction_bias = optional.correction_bias != 0;
  if (s.has_correction_bias) s.correction_bias = shape(optional.correction_bias);
  s.has_expert_norms = optional.expert_norms != 0;
  if (s.has_expert_norms) s.expert_norms = shape(optional.expert_norms);
  return s;
}

}  // namespace

AdaptiveKMoe::AdaptiveKMoe(const ov::OutputVector& inputs, Attributes attributes)
    : Op(inputs), attributes_(std::move(attributes)) {
  constructor_validate_and_infer_types();
}

void AdaptiveKMoe::validate_and_infer_types() {
  params_ = parse_attributes(this, attributes_);
  const bool gated = is_gated(params_.activation);
  const size_t fewest = OptionalInputs::fewest(params_, attributes_);
  NODE_VALIDATION_CHECK(this, get_input_size() == fewest || get_input_size() == fewest + 1,
                        "AdaptiveKMoe: has ", get_input_size(), " inputs but takes ", fewest,
                        ", or ", fewest + 1, " with correction_bias",
                        is_quantised(params_.weight_format) ? " (with the weights' scales)" : "",
                        attributes_.has_expert_norms != 0 ? " (expert_norms is the last)" : "");
  const OptionalInputs optional(get_input_size(), params_, attributes_);
  for (size_t i = 0; i < get_input_size(); ++i) {
    const ov::element::Type type = get_input_element_type(i);
    const bool is_weight = i == kUp || i == kDown;
    const bool integer = i == kPolicyIndex || i == kPolicyKind || i == kKValues ||
                         (optional.expert_load != 0 && i == optional.expert_load);
    const bool bits = is_weight && params_.weight_format == WeightFormat::kBFloat16;
    const ov::element::Type expected = integer     ? ov::element::i32
                                       : is_weight ? weight_type(params_.weight_format)
                                                   : ov::element::f32;
    const std::string by_format =
        is_weight ? ", by weight_format " + attributes_.weight_format : std::string();
    NODE_VALIDATION_CHECK(
        this, type.is_dynamic() || type == expected || (bits && type == ov::element::bf16),
        "AdaptiveKMoe: input ", input_name(i, gated, optional), " has element type ", type,
        " but must be ", bits ? "u8 (the bytes of bfloat16) or bf16" : expected.get_type_name(),
        by_format);
  }
  cpu::Sizes sizes;
  try {
    sizes = cpu::check_shapes(params_, input_shapes(optional, [this](size_t i) {
                                const cpu::Shape shape = shape_of(get_input_partial_shape(i));
                                if (i != kUp && i != kDown) return shape;
                                return weight_shape(shape, get_input_element_type(i),
                                                    params_.weight_format);
                              }));
    cpu::check_quantised_rows(params_, sizes);
  } catch (const std::invalid_argument& error) {
    NODE_VALIDATION_CHECK(this, false, error.what());
  }
  if (optional.expert_load != 0) {
    const ov::PartialShape& load = get_input_partial_shape(optional.expert_load);
    NODE_VALIDATION_CHECK(this, load.compatible(ov::PartialShape{sizes.experts}),
                          "AdaptiveKMoe: expert_load has shape ", load, " but must be [",
                          sizes.experts, "]");
  }
  set_output_size(3);
  set_output_type(0, ov::element::f32, ov::PartialShape{sizes.tokens, sizes.hidden});
  set_output_type(1, ov::element::i32, ov::PartialShape{sizes.tokens});
  set_output_type(2, ov::element::f32, ov::PartialShape{sizes.tokens});
}

bool AdaptiveKMoe::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("activation", attributes_.activation);
  visitor.on_attribute("scoring", attributes_.scoring);
  visitor.on_attribute("weight_format", attributes_.weight_format);
  visitor.on_attribute("norm_topk_prob", attributes_.norm_topk_prob);
  visitor.on_attribute("routed_scaling_factor", attributes_.routed_scaling_factor);
  visitor.on_attribute("n_group", attributes_.n_group);
  visitor.on_attribute("topk_group", attributes_.topk_group);
  visitor.on_attribute("max_k", attributes_.max_k);
  visitor.on_attribute("has_expert_norms", attributes_.has_expert_norms);
  visitor.on_attribute("has_expert_load", attributes_.has_expert_load);
  return true;
}

std::shared_ptr<ov::Node> AdaptiveKMoe::clone_with_new_inputs(
    const ov::OutputVector& inputs) const {
  return std::make_shared<AdaptiveKMoe>(inputs, attributes_);
}

bool AdaptiveKMoe::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
  const OptionalInputs optional(inputs.size(), params_, attributes_);
  cpu::Sizes sizes;
  try {
    sizes = cpu::check_shapes(
        params_, input_shapes(optional, [&](size_t i) {
          const ov::Shape& given = inputs[i].get_shape();
          const cpu::Shape shape = std::vector<int64_t>(given.begin(), given.end());
          if (i != kUp && i != kDown) return shape;
          return weight_shape(shape, inputs[i].get_element_type(), params_.weight_format);
        }));
    cpu::check_quantised_rows(params_, sizes);
  } catch (const std::invalid_argument& error) {
    OPENVINO_THROW(error.what());
  }
  const size_t tokens = sizes.tokens;
  outputs[0].set_shape({tokens, static_cast<size_t>(sizes.hidden)});
  outputs[1].set_shape({tokens});
  outputs[2].set_shape({tokens});
  if (tokens == 0) return true;

  cpu::RoutingArguments routing;
  routing.tokens = sizes.tokens;
  routing.experts = static_cast<int32_t>(sizes.experts);
  routing.policies = static_cast<int32_t>(sizes.policies);
  routing.choices = static_cast<int32_t>(sizes.choices);
  routing.router_logits = inputs[kRouterLogits].data<const float>();
  routing.policy_index = inputs[kPolicyIndex].data<const int32_t>();
  routing.policy_kind = inputs[kPolicyKind].data<const int32_t>();
  routing.thresholds = inputs[kThresholds].data<const float>();
  routing.k_values = inputs[kKValues].data<const int32_t>();
  if (optional.correction_bias != 0)
    routing.correction_bias = inputs[optional.correction_bias].data<const float>();
  if (optional.expert_norms != 0)
    routing.expert_norms = inputs[optional.expert_norms].data<const float>();
  if (optional.expert_load != 0) {
    // The tensor object is constant and its memory is the application's to be written.
    const void* load = inputs[optional.expert_load].data();
    routing.expert_load = static_cast<uint32_t*>(const_cast<void*>(load));
    if (inputs[optional.expert_load].get_size() != static_cast<size_t>(sizes.experts))
      OPENVINO_THROW("AdaptiveKMoe: expert_load must have one element for each expert");
  }
  cpu::ExpertArguments experts;
  experts.hidden = sizes.hidden;
  experts.intermediate = sizes.intermediate;
  experts.hidden_states = inputs[kHiddenStates].data<const float>();
  experts.up = inputs[kUp].data();
  experts.down = inputs[kDown].data();
  if (optional.up_scales != 0) {
    experts.up_scales = inputs[optional.up_scales].data<const float>();
    experts.down_scales = inputs[optional.down_scales].data<const float>();
    experts.group_size = sizes.group_size;
  }
  cpu::moe(params_, routing, experts, outputs[0].data<float>(), outputs[1].data<int32_t>(),
           outputs[2].data<float>());
  return true;
}

}  // namespace adaptive_k::openvino
