// SPDX-License-Identifier: Apache-2.0
// A dense product of tokens and a stored weight as an OpenVINO operation, for engines whose
// products are not float32 (cpu/linear).
#pragma once

#include <openvino/op/op.hpp>
#include <string>

#include "cpu/linear/compute.h"

namespace adaptive_k::openvino {

// Linear(input [..., K] f32, weight [N, K], [scales [N, groups] or [N] f32]) -> [..., N] f32. The
// weight is u8, the bytes of bfloat16, or i8 with scales.
class Linear : public ov::op::Op {
 public:
  OPENVINO_OP("Linear", "adaptive_k");

  Linear() = default;
  Linear(const ov::OutputVector& inputs, const std::string& weight_format,
         const std::string& activation_format);

  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool has_evaluate() const override { return true; }
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

 private:
  // Format, sizes and group size from the constants' shapes; throws with a sentence.
  cpu::LinearArguments arguments(const ov::Shape& weight, const ov::Shape& scales) const;

  std::string weight_format_, activation_format_;
};

}  // namespace adaptive_k::openvino
