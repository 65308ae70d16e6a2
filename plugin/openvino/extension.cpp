// SPDX-License-Identifier: Apache-2.0
// What core.add_extension() finds in this library: the operation, for models in OpenVINO's own
// format, and its conversion from ONNX.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>

#include "adaptive_k_moe.h"

namespace {

using adaptive_k::openvino::AdaptiveKMoe;
using adaptive_k::openvino::Attributes;

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
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i)
    inputs.push_back(node.get_input(static_cast<int>(i)));
  return std::make_shared<AdaptiveKMoe>(inputs, a)->outputs();
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<AdaptiveKMoe>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("AdaptiveKMoe", "adaptive_k",
                                                              from_onnx),
}));
