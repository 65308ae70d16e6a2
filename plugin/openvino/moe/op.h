// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe as an OpenVINO operation: shapes, attributes and a call into plugin/cpu.
#pragma once

#include <openvino/op/op.hpp>
#include <string>

#include "operator/moe/params.h"

namespace adaptive_k::openvino {

// The attributes as a model file spells them.
struct Attributes {
  std::string activation = "swiglu";
  std::string scoring = "softmax";
  std::string weight_format = "float32";
  int64_t norm_topk_prob = 1;
  float routed_scaling_factor = 1.0f;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  int64_t max_k = 0;
  int64_t has_expert_norms = 0;  // which of the optional inputs a ninth one is
  // Only here, not in the operator's description: a last input [E] i32, to which each call adds, in
  // place and modulo 2^32, the tokens that each expert ran for.
  int64_t has_expert_load = 0;
};

class AdaptiveKMoe : public ov::op::Op {
 public:
  OPENVINO_OP("AdaptiveKMoe", "adaptive_k");

  AdaptiveKMoe() = default;
  AdaptiveKMoe(const ov::OutputVector& inputs, Attributes attributes);

  void validate_and_infer_types() override;
  bool visit_attributes(ov::AttributeVisitor& visitor) override;
  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
  bool has_evaluate() const override { return true; }
  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

 private:
  Attributes attributes_;
  MoeParams params_;  // attributes_, parsed by validate_and_infer_types()
};

}  // namespace adaptive_k::openvino
