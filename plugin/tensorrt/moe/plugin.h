// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe as a TensorRT plugin: shapes, types, fields and a call into plugin/cuda.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <string>

#include "cuda/moe/launcher.h"
#include "tensorrt/fields.h"
#include "tensorrt/moe/problem.h"
#include "tensorrt/plugin_base.h"

namespace adaptive_k::tensorrt {

struct AdaptiveKTraits {
  using Attributes = tensorrt::Attributes;
  using Fields = FieldList;
  static constexpr const char* kName = "AdaptiveKMoe";
  static constexpr const char* kVersion = "1";
  static constexpr int32_t kNumOutputs = tensorrt::kNumOutputs;
  static Attributes read(const nvinfer1::PluginFieldCollection* fields) {
    return read_fields(fields);
  }
  static const nvinfer1::PluginFieldCollection* names() { return field_names(); }
  static std::string describe(const Attributes& attributes) {
    return tensorrt::describe(attributes);
  }
};

class AdaptiveKPlugin final : public PluginBase<AdaptiveKTraits> {
 public:
  using PluginBase::PluginBase;

  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneBuild
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out,
                          int32_t num_outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* in_out,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;

  // IPluginV3OneRuntime
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* out,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc,
                  const nvinfer1::PluginTensorDesc* output_desc, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

 private:
  // Checks what will run and remembers it. Throws std::invalid_argument.
  void accept_shapes(const nvinfer1::PluginTensorDesc* in, const Inputs& inputs);

  Inputs inputs_;         // count is 0 before any were accepted
  cuda::MoeShape shape_;  // of the last step; experts is 0 before the first
};

using AdaptiveKPluginCreator = PluginCreator<AdaptiveKPlugin, AdaptiveKTraits>;

}  // namespace adaptive_k::tensorrt
