// SPDX-License-Identifier: Apache-2.0
#include "openvino/mamba/op.h"

#include "cpu/mamba/compute.h"

namespace adaptive_k::openvino {

Mamba2::Mamba2(const ov::OutputVector& inputs, const MambaParams& params)
    : TableOp(inputs, params) {
  constructor_validate_and_infer_types();
}

void Mamba2::validate_and_infer_types() {
  const CallInputs<Mamba> inputs = inputs_of(get_input_size());
  check_types(inputs);
  const MambaSizes sizes = sizes_of(inputs);
  const bool known = sizes.heads >= 0 && sizes.head_dim >= 0;
  set_output_size(1);
  set_output_type(0, ov::element::f32,
                  ov::PartialShape{sizes.tokens, known ? sizes.heads * sizes.head_dim : -1});
}

std::shared_ptr<ov::Node> Mamba2::clone_with_new_inputs(const ov::OutputVector& inputs) const {
  return std::make_shared<Mamba2>(inputs, params_);
}

bool Mamba2::evaluate(ov::TensorVector& outputs, const ov::TensorVector& tensors) const {
  const CallInputs<Mamba> inputs = inputs_of(tensors.size());
  const MambaSizes sizes = sizes_of(inputs, tensors);
  const cpu::MambaArguments arguments(sizes, addresses_of(inputs, tensors));
  outputs[0].set_shape(
      {static_cast<size_t>(sizes.tokens), static_cast<size_t>(sizes.heads * sizes.head_dim)});
  set([&] { cpu::mamba2(params_, arguments, outputs[0].data<float>()); });
  return true;
}

}  // namespace adaptive_k::openvino
