// SPDX-License-Identifier: Apache-2.0
// An operator's table as an OpenVINO operation: attributes, inputs, types and shapes. What is left
// to the operations is their outputs and the call into plugin/cpu.
#pragma once

#include <openvino/op/op.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "operator/shapes.h"
#include "operator/table.h"
#include "operator/weight_format.h"

namespace adaptive_k::openvino {

inline ov::element::Type type_of(TypeRule rule, WeightFormat format) {
  switch (rule) {
    case TypeRule::kElement:
    case TypeRule::kFloat32:
      return ov::element::f32;
    case TypeRule::kInt32:
      return ov::element::i32;
    case TypeRule::kWeights:
      // Numbers travel as bytes. OpenVINO's CPU plugin widens constants of 16-bit types (u16 among
      // them) that feed a custom operator, and copies all of one of f32 that has a subnormal
      // number; bytes stay where the file is mapped.
      return is_quantised(format) ? ov::element::i8 : ov::element::u8;
  }
  return ov::element::dynamic;
}

// ov::Shape or ov::PartialShape.
inline Shape shape_of(const ov::PartialShape& shape) {
  if (shape.rank().is_dynamic()) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const ov::Dimension& d : shape) sizes.push_back(d.is_static() ? d.get_length() : -1);
  return sizes;
}

template <typename Table>
class TableOp : public ov::op::Op {
 public:
  using Params = typename Table::Params;

  TableOp() = default;
  TableOp(const ov::OutputVector& inputs, const Params& params)
      : ov::op::Op(inputs), params_(params) {}

  // An attribute travels as a string, an int64 or a float.
  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (const auto& a : Table::kAttributes) {
      if (a.type == AttributeType::kWord) {
        std::string word = word_of(a, params_);
        visitor.on_attribute(a.name, word);
        set([&] { set_word(a, "attribute", word, &params_); });
      } else if (a.type == AttributeType::kReal) {
        auto value = static_cast<float>(a.get(params_));
        visitor.on_attribute(a.name, value);
        a.set(&params_, value);
      } else {
        auto value = static_cast<int64_t>(a.get(params_));
        visitor.on_attribute(a.name, value);
        set([&] { set_integer(a, "attribute", value, &params_); });
      }
    }
    return true;
  }

  bool has_evaluate() const override { return true; }

  // A node of ONNX's attributes.
  template <typename Node>
  static Params params_of(const Node& node) {
    Params params;
    for (const auto& a : Table::kAttributes) {
      if (a.type == AttributeType::kWord) {
        const auto word = node.template get_attribute<std::string>(a.name, word_of(a, params));
        set([&] { set_word(a, "attribute", word, &params); });
      } else if (a.type == AttributeType::kReal) {
        a.set(&params, node.template get_attribute<float>(a.name, a.get(params)));
      } else {
        const auto value = node.template get_attribute<int64_t>(a.name, a.get(params));
        set([&] { set_integer(a, "attribute", value, &params); });
      }
    }
    return params;
  }

 protected:
  // What body finds wrong, as OpenVINO's exception that begins with the operator's name.
  template <typename Body>
  static auto set(const Body& body) {
    try {
      return body();
    } catch (const std::invalid_argument& error) {
      OPENVINO_THROW(std::string(Table::kName), ": ", error.what());
    }
  }

  // The first `count` inputs are the table's.
  CallInputs<Table> inputs_of(int64_t count) const {
    return set([&] { return find_inputs<Table>(params_, count); });
  }

  void check_types(const CallInputs<Table>& inputs) const {
    for (int32_t i = 0; i < inputs.count; ++i) {
      const Tensor& input = Table::kInputs[inputs.place[i]];
      const ov::element::Type type = get_input_element_type(i);
      const ov::element::Type expected = type_of(input.type, format());
      const bool weight = input.type == TypeRule::kWeights;
      const bool bytes = weight && expected == ov::element::u8;
      const ov::element::Type value =
          format() == WeightFormat::kBFloat16 ? ov::element::bf16 : ov::element::f32;
      if (type.is_dynamic() || type == expected || (bytes && type == value)) continue;
      OPENVINO_THROW(
          Table::kName, ": input ", input_name<Table>(params_, inputs.place[i]),
          " has element type ", type, " but must be ",
          (bytes ? "u8 (its bytes) or " : "") + (bytes ? value : expected).get_type_name(),
          weight ? std::string(", by weight_format ") + spelling(format()) : "");
    }
  }

  // The sizes that follow from what is known of the shapes; shape(i) and type(i) are of input i.
  template <typename ShapeOf, typename TypeOf>
  auto sizes_of(const CallInputs<Table>& inputs, const ShapeOf& shape, const TypeOf& type) const {
    Shapes<Table> shapes;
    for (int32_t i = 0; i < inputs.count; ++i) {
      const int32_t place = inputs.place[i];
      shapes[place] = shape_of(shape(i));
      const int32_t bits = bits_of(stored_format(format(), WeightFormat::kFloat32));
      if (Table::kInputs[place].type == TypeRule::kWeights && type(i).is_static())
        shapes[place] = in_values(shapes[place], static_cast<int64_t>(type(i).bitwidth()), bits);
    }
    return set([&] { return check_shapes(params_, shapes); });
  }

  auto sizes_of(const CallInputs<Table>& inputs) const {
    return sizes_of(
        inputs, [this](size_t i) { return get_input_partial_shape(i); },
        [this](size_t i) { return get_input_element_type(i); });
  }
  auto sizes_of(const CallInputs<Table>& inputs, const ov::TensorVector& tensors) const {
    return sizes_of(
        inputs, [&](size_t i) { return ov::PartialShape(tensors[i].get_shape()); },
        [&](size_t i) { return tensors[i].get_element_type(); });
  }

  static Addresses<typename Table::Input> addresses_of(const CallInputs<Table>& inputs,
                                                       const ov::TensorVector& tensors) {
    Addresses<typename Table::Input> addresses;
    for (int32_t i = 0; i < inputs.count; ++i) addresses.at[inputs.place[i]] = tensors[i].data();
    return addresses;
  }

  WeightFormat format() const { return Table::weight_format(params_); }

  Params params_;
};

}  // namespace adaptive_k::openvino
