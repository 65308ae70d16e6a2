// SPDX-License-Identifier: Apache-2.0
#include "openvino/linear/op.h"

#include <stdexcept>

#include "operator/shapes.h"
#include "operator/table.h"

namespace adaptive_k::openvino {
namespace {

template <typename Enum>
Enum value_of(const char* attribute, const std::string& word) {
  const WordList list = words_of(Enum{});
  for (int32_t i = 0; i < list.count; ++i)
    if (list.words[i].word == word) return static_cast<Enum>(list.words[i].value);
  OPENVINO_THROW("Linear: attribute ", attribute, " is '", word, "' but must be one of ",
                 choices(list));
}

}  // namespace

Linear::Linear(const ov::OutputVector& inputs, const std::string& weight_format,
               const std::string& activation_format)
    : Op(inputs), weight_format_(weight_format), activation_format_(activation_format) {
  constructor_validate_and_infer_types();
}

cpu::LinearArguments Linear::arguments(const ov::Shape& weight, const ov::Shape& scales) const {
  cpu::LinearArguments args{};
  args.weight_format = value_of<WeightFormat>("weight_format", weight_format_);
  args.activation_format = value_of<ActivationFormat>("activation_format", activation_format_);
  const bool quantised = is_quantised(args.weight_format);
  const auto type = get_input_element_type(1);
  if (type != (quantised ? ov::element::i8 : ov::element::u8) ||
      !(quantised || args.weight_format == WeightFormat::kBFloat16))
    OPENVINO_THROW("Linear: weight_format is '", weight_format_, "' and the weight ", type,
                   ", but it must be bfloat16 in u8, or int8 or int4 in i8");
  if (!quantised && args.activation_format != ActivationFormat::kAsHiddenStates)
    OPENVINO_THROW("Linear: activation_format must be empty unless weight_format is int8 or int4");
  if (weight.size() != 2) OPENVINO_THROW("Linear: the weight has shape ", weight, ", not [N, K]");
  args.out_features = static_cast<int64_t>(weight[0]);
  args.in_features = static_cast<int64_t>(weight[1]) * 8 / bits_of(args.weight_format);
  if (quantised) {
    const int64_t groups = scales.size() == 2 ? static_cast<int64_t>(scales[1]) : 1;
    if (scales.empty() || scales.size() > 2 || scales[0] != weight[0] || groups < 1 ||
        args.in_features % groups != 0)
      OPENVINO_THROW("Linear: the scales have shape ", scales,
                     " but must be [N] or [N, groups], where ", "N = ", weight[0],
                     " and groups divides K = ", args.in_features);
    args.group_size = groups == 1 ? 0 : args.in_features / groups;
    if (args.in_features % row_multiple(args.weight_format) != 0 ||
        args.group_size % kGroupMultiple != 0)
      OPENVINO_THROW("Linear: rows of ", weight_format_, " must be multiples of ",
                     row_multiple(args.weight_format), " values and groups of ", kGroupMultiple,
                     ", but K is ", args.in_features, " in ", groups, " groups");
  }
  return args;
}

void Linear::validate_and_infer_types() {
  const bool quantised = get_input_size() == 3;
  NODE_VALIDATION_CHECK(this, get_input_size() == 2 || quantised, "Linear: takes 2 or 3 inputs");
  NODE_VALIDATION_CHECK(this, get_input_element_type(0).compatible(ov::element::f32),
                        "Linear: the input must be f32");
  ov::PartialShape shape = get_input_partial_shape(0);
  if (get_input_partial_shape(1).is_static() &&
      (!quantised || get_input_partial_shape(2).is_static())) {
    const cpu::LinearArguments args =
        arguments(get_input_shape(1), quantised ? get_input_shape(2) : ov::Shape{});
    NODE_VALIDATION_CHECK(this, quantised == is_quantised(args.weight_format),
                          "Linear: quantised weights have scales, and others none");
    if (shape.rank().is_static()) {
      NODE_VALIDATION_CHECK(
          this, shape.size() > 0 && shape[shape.size() - 1].compatible(args.in_features),
          "Linear: the input has shape ", shape, " but the weight takes ", args.in_features,
          " features");
      shape[shape.size() - 1] = args.out_features;
    }
  } else if (shape.rank().is_static() && shape.size() > 0) {
    shape[shape.size() - 1] = ov::Dimension::dynamic();
  }
  set_output_type(0, ov::element::f32, shape);
}

bool Linear::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("weight_format", weight_format_);
  visitor.on_attribute("activation_format", activation_format_);
  return true;
}

std::shared_ptr<ov::Node> Linear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return std::make_shared<Linear>(inputs, weight_format_, activation_format_);
}

bool Linear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& tensors) const {
  const bool quantised = tensors.size() == 3;
  cpu::LinearArguments args =
      arguments(tensors[1].get_shape(), quantised ? tensors[2].get_shape() : ov::Shape{});
  ov::Shape shape = tensors[0].get_shape();
  args.tokens = static_cast<int64_t>(tensors[0].get_size()) / args.in_features;
  args.input = tensors[0].data<float>();
  args.weight = tensors[1].data();
  args.scales = quantised ? tensors[2].data<float>() : nullptr;
  shape.back() = static_cast<size_t>(args.out_features);
  outputs[0].set_shape(shape);
  cpu::linear(args, outputs[0].data<float>());
  return true;
}

}  // namespace adaptive_k::openvino
