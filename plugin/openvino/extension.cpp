// SPDX-License-Identifier: Apache-2.0
// What core.add_extension() finds in this library: the operations, for models in OpenVINO's own
// format, and their conversions from ONNX.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>

#include "openvino/linear/op.h"
#include "openvino/mamba/op.h"
#include "openvino/moe/op.h"

namespace {

using adaptive_k::openvino::AdaptiveKMoe;
using adaptive_k::openvino::Linear;
using adaptive_k::openvino::Mamba2;

ov::OutputVector inputs_of(const ov::frontend::NodeContext& node) {
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i)
    inputs.push_back(node.get_input(static_cast<int>(i)));
  return inputs;
}

ov::OutputVector linear_from_onnx(const ov::frontend::NodeContext& node) {
  return std::make_shared<Linear>(inputs_of(node), node.get_attribute<std::string>("weight_format"),
                                  node.get_attribute<std::string>("activation_format", ""))
      ->outputs();
}

template <typename Operation>
ov::OutputVector from_onnx(const ov::frontend::NodeContext& node) {
  return std::make_shared<Operation>(inputs_of(node), Operation::params_of(node))->outputs();
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<AdaptiveKMoe>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("AdaptiveKMoe", "adaptive_k",
                                                              from_onnx<AdaptiveKMoe>),
    std::make_shared<ov::OpExtension<Linear>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("Linear", "adaptive_k",
                                                              linear_from_onnx),
    std::make_shared<ov::OpExtension<Mamba2>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>("Mamba2", "adaptive_k",
                                                              from_onnx<Mamba2>),
}));
