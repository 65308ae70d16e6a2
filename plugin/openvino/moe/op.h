// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe as an OpenVINO operation.
#pragma once

#include "openvino/table_op.h"
#include "operator/moe/description.h"
#include "operator/moe/shapes.h"

namespace adaptive_k::openvino {

class AdaptiveKMoe : public TableOp<Moe> {
 public:
  OPENVINO_OP("AdaptiveKMoe", "adaptive_k");

  AdaptiveKMoe() = default;
  AdaptiveKMoe(const ov::OutputVector& inputs, const MoeParams& params,
               bool has_expert_load = false);

  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

 private:
  // Only here, not in the operator's description: a last input [E] i32, to which each call adds, in
  // place and modulo 2^32, the tokens that each expert ran for.
  int64_t has_expert_load_ = 0;
};

}  // namespace adaptive_k::openvino
