// SPDX-License-Identifier: Apache-2.0
#include "openvino/moe/op.h"

#include "cpu/moe/compute.h"

namespace adaptive_k::openvino {

AdaptiveKMoe::AdaptiveKMoe(const ov::OutputVector& inputs, const MoeParams& params,
                           bool has_expert_load)
    : TableOp(inputs, params), has_expert_load_(has_expert_load) {
  constructor_validate_and_infer_types();
}

void AdaptiveKMoe::validate_and_infer_types() {
  const size_t count = get_input_size() - (has_expert_load_ != 0);
  const CallInputs<Moe> inputs = inputs_of(count);
  set([&] { check_cpu_weights(params_, MoeSizes()); });
  check_types(inputs);
  const MoeSizes sizes = sizes_of(inputs);
  set([&] { check_cpu_weights(params_, sizes); });
  if (has_expert_load_ != 0) {
    const ov::PartialShape& load = get_input_partial_shape(count);
    NODE_VALIDATION_CHECK(this,
                          load.compatible(ov::PartialShape{sizes.experts}) &&
                              get_input_element_type(count).compatible(ov::element::i32),
                          "AdaptiveKMoe: expert_load has shape ", load, " but must be [",
                          sizes.experts, "] i32");
  }
  set_output_size(3);
  set_output_type(0, ov::element::f32, ov::PartialShape{sizes.tokens, sizes.hidden});
  set_output_type(1, ov::element::i32, ov::PartialShape{sizes.tokens});
  set_output_type(2, ov::element::f32, ov::PartialShape{sizes.tokens});
}

bool AdaptiveKMoe::visit_attributes(ov::AttributeVisitor& visitor) {
  TableOp::visit_attributes(visitor);
  visitor.on_attribute("has_expert_load", has_expert_load_);
  return true;
}

std::shared_ptr<ov::Node> AdaptiveKMoe::clone_with_new_inputs(
    const ov::OutputVector& inputs) const {
  return std::make_shared<AdaptiveKMoe>(inputs, params_, has_expert_load_ != 0);
}

bool AdaptiveKMoe::evaluate(ov::TensorVector& outputs, const ov::TensorVector& tensors) const {
  const size_t count = tensors.size() - (has_expert_load_ != 0);
  const CallInputs<Moe> inputs = inputs_of(count);
  cpu::MoeArguments arguments;
  arguments.sizes = sizes_of(inputs, tensors);
  set([&] { check_cpu_weights(params_, arguments.sizes); });
  arguments.inputs = addresses_of(inputs, tensors);
  const auto tokens = static_cast<size_t>(arguments.sizes.tokens);
  outputs[0].set_shape({tokens, static_cast<size_t>(arguments.sizes.hidden)});
  outputs[1].set_shape({tokens});
  outputs[2].set_shape({tokens});
  if (has_expert_load_ != 0) {
    // The tensor object is constant and its memory is the application's to be written.
    arguments.expert_load = static_cast<uint32_t*>(const_cast<void*>(tensors[count].data()));
    if (tensors[count].get_size() != static_cast<size_t>(arguments.sizes.experts))
      OPENVINO_THROW("AdaptiveKMoe: expert_load must have one element for each expert");
  }
  cpu::moe(params_, arguments, outputs[0].data<float>(), outputs[1].data<int32_t>(),
           outputs[2].data<float>());
  return true;
}

}  // namespace adaptive_k::openvino
