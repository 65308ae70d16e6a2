// SPDX-License-Identifier: Apache-2.0
#include "openvino/mamba/op.h"

#include <stdexcept>

#include "cpu/mamba/compute.h"

namespace adaptive_k::openvino {
namespace {

using cpu::kMambaInputs;
using cpu::MambaInput;

bool is_integer(int index) {
  return index >= static_cast<int>(MambaInput::kSubsequenceBegins) &&
         index <= static_cast<int>(MambaInput::kStateSlots);
}

template <typename ShapeOf>
cpu::MambaSizes sizes_of(const MambaParams& params, const ShapeOf& shape) {
  cpu::Shape shapes[kMambaInputs];
  for (int i = 0; i < kMambaInputs; ++i) shapes[i] = shape(i);
  return cpu::check_mamba_shapes(params, shapes);
}

cpu::Shape known_part(const ov::PartialShape& shape) {
  if (shape.rank().is_dynamic()) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const ov::Dimension& d : shape) sizes.push_back(d.is_static() ? d.get_length() : -1);
  return sizes;
}

}  // namespace

Mamba2::Mamba2(const ov::OutputVector& inputs, Attributes attributes)
    : Op(inputs), attributes_(attributes) {
  constructor_validate_and_infer_types();
}

MambaParams Mamba2::params() const {
  return {static_cast<int32_t>(attributes_.n_groups), attributes_.dt_min, attributes_.dt_max};
}

void Mamba2::validate_and_infer_types() {
  NODE_VALIDATION_CHECK(this, get_input_size() == kMambaInputs, "Mamba2: has ", get_input_size(),
                        " inputs but takes ", kMambaInputs);
  for (int i = 0; i < kMambaInputs; ++i) {
    const ov::element::Type type = get_input_element_type(i);
    const ov::element::Type expected = is_integer(i) ? ov::element::i32 : ov::element::f32;
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == expected, "Mamba2: input ",
                          cpu::mamba_input_name(i), " has element type ", type, " but must be ",
                          expected);
  }
  cpu::MambaSizes sizes;
  try {
    sizes = sizes_of(params(), [this](int i) { return known_part(get_input_partial_shape(i)); });
  } catch (const std::invalid_argument& error) {
    NODE_VALIDATION_CHECK(this, false, error.what());
  }
  const bool known = sizes.heads >= 0 && sizes.head_dim >= 0;
  set_output_size(1);
  set_output_type(0, ov::element::f32,
                  ov::PartialShape{sizes.tokens, known ? sizes.heads * sizes.head_dim : -1});
}

bool Mamba2::visit_attributes(ov::AttributeVisitor& visitor) {
  visitor.on_attribute("n_groups", attributes_.n_groups);
  visitor.on_attribute("dt_min", attributes_.dt_min);
  visitor.on_attribute("dt_max", attributes_.dt_max);
  return true;
}

std::shared_ptr<ov::Node> Mamba2::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return std::make_shared<Mamba2>(inputs, attributes_);
}

bool Mamba2::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
  cpu::MambaArguments args;
  try {
    args.sizes = sizes_of(params(), [&](int i) -> cpu::Shape {
      const ov::Shape& shape = inputs[i].get_shape();
      return std::vector<int64_t>(shape.begin(), shape.end());
    });
  } catch (const std::invalid_argument& error) {
    OPENVINO_THROW(error.what());
  }
  const auto floats = [&](MambaInput i) { return inputs[static_cast<int>(i)].data<const float>(); };
  const auto integers = [&](MambaInput i) {
    return inputs[static_cast<int>(i)].data<const int32_t>();
  };
  // The tensor object is constant and its memory is the application's to be written.
  const auto state = [&](MambaInput i) { return const_cast<float*>(floats(i)); };
  args.conv_input = floats(MambaInput::kConvInput);
  args.dt = floats(MambaInput::kDt);
  args.subsequence_begins = integers(MambaInput::kSubsequenceBegins);
  args.past_lens = integers(MambaInput::kPastLens);
  args.state_slots = integers(MambaInput::kStateSlots);
  args.conv_weight = floats(MambaInput::kConvWeight);
  args.conv_bias = floats(MambaInput::kConvBias);
  args.a = floats(MambaInput::kA);
  args.d = floats(MambaInput::kD);
  args.dt_bias = floats(MambaInput::kDtBias);
  args.conv_state = state(MambaInput::kConvState);
  args.ssm_state = state(MambaInput::kSsmState);
  outputs[0].set_shape({static_cast<size_t>(args.sizes.tokens),
                        static_cast<size_t>(args.sizes.heads * args.sizes.head_dim)});
  try {
    cpu::mamba2(params(), args, outputs[0].data<float>());
  } catch (const std::invalid_argument& error) {
    OPENVINO_THROW(error.what());
  }
  return true;
}

}  // namespace adaptive_k::openvino
