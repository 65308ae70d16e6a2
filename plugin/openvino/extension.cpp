// SPDX-License-Identifier: Apache-2.0
// What core.add_extension() finds in this library: the operations, for models in OpenVINO's own
// format, and their conversions from ONNX.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>

#include "openvino/mamba/op.h"
#include "openvino/moe/op.h"

namespace {

using adaptive_k::openvino::AdaptiveKMoe;
using adaptive_k::openvino::Attributes;
using adaptive_k::openvino::Mamba2;

ov::OutputVector inputs_of(const ov::frontend::NodeContext& node) {
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i)
    inputs.push_back(node.get_input(static_cast<int>(i)));
  return inputs;
}

ov::OutputVector from_onnx(const ov::frontend::NodeContext& node) {
  const Attributes defaults;
  Attributes a;
  a.activation = node.get_attribute<std::string>("activation", defaults.activation);
  a.scoring = node.get_attribute<std::string>("scoring", defaults.scoring);
  a.weight_format = node.get_attribute<std::string>("weight_format", defaults.weight_format);
  a.norm_topk_prob = node.get_attribute<int64_t>("norm_topk_prob", defaults.norm_topk_prob);
  a.routed_scaling_factor =
      node.get_attribute<float>("routed_scaling_factor", defaults.routed_scaling_factor);
  a.n_group = node.get_attribute<int64_t>("n_group", defaults.n_group);
  a.topk_group = node.get_attribute<int64_t>("topk_group", defaults.topk_group);
  a.max_k = node.get_attribute<int64_t>("max_k", defaults.max_k);
  a.has_expert_norms = node.get_attribute<int64_t>("has_expert_norms", defaults.has_expert_norms);
  return std::make_shared<AdaptiveKMoe>(inputs_of(node), a)->outputs();
}

ov::OutputVector mamba2_from_onnx(const ov::frontend::NodeContext& node) {
  Mamba2::Attributes a;
  a.n_groups = node.get_attribute<int64_t>("n_groups", a.n_groups);
  a.dt_min = node.get_attribute<float>("dt_min", a.dt_min);
  a.dt_max = node.get_attribute<float>("dt_max", a.dt_max);
  return std::make_shared<Mamba2>(inputs_of(node), a)->outputs();
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<AdaptiveKMoe>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("AdaptiveKMoe", "adaptive_k",
                                                              from_onnx),
    std::make_shared<ov::OpExtension<Mamba2>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("Mamba2", "adaptive_k",
                                                              mamba2_from_onnx),
}));
