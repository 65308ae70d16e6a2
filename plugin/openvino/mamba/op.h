// SPDX-License-Identifier: Apache-2.0
// Mamba2 as an OpenVINO operation.
//
// It has one output. The states are inputs that it updates in place: the tensors which the
// application sets for conv_state and ssm_state are the memory that the sequences live in.
#pragma once

#include "openvino/table_op.h"
#include "operator/mamba/description.h"
#include "operator/mamba/shapes.h"

namespace adaptive_k::openvino {

class Mamba2 : public TableOp<Mamba> {
 public:
  OPENVINO_OP("Mamba2", "adaptive_k");

  Mamba2() = default;
  Mamba2(const ov::OutputVector& inputs, const MambaParams& params);

  void validate_and_infer_types() override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
};

}  // namespace adaptive_k::openvino
