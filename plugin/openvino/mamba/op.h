// SPDX-License-Identifier: Apache-2.0
// Mamba2 as an OpenVINO operation: shapes, attributes and a call into plugin/cpu.
//
// It has one output. The states are inputs that it updates in place: the tensors which the
// application sets for conv_state and ssm_state are the memory that the sequences live in.
#pragma once

#include <limits>
#include <openvino/op/op.hpp>

#include "operator/mamba/params.h"

namespace adaptive_k::openvino {

class Mamba2 : public ov::op::Op {
 public:
  OPENVINO_OP("Mamba2", "adaptive_k");

  // The attributes as a model file spells them.
  struct Attributes {
    int64_t n_groups = 1;
    float dt_min = 0.0f;
    float dt_max = std::numeric_limits<float>::infinity();
  };

  Mamba2() = default;
  Mamba2(const ov::OutputVector& inputs, Attributes attributes);

  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool has_evaluate() const override { return true; }
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

 private:
  MambaParams params() const;

  Attributes attributes_;
};

}  // namespace adaptive_k::openvino
