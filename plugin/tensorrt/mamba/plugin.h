// SPDX-License-Identifier: Apache-2.0
// Mamba2 as a TensorRT plugin.
//
// The states go in and come out, and whoever runs the engine binds both to one memory: then they
// are updated in place. Bound apart they come out whole as well. That a state's output aliases its
// input is not declared (IPluginV3OneBuildV2): TensorRT needs a preview feature for it, has it from
// 10.3 on only, and then may keep a copy of each state.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <string>

#include "tensorrt/mamba/problem.h"
#include "tensorrt/plugin_base.h"

namespace adaptive_k::tensorrt {

struct MambaTraits {
  using Attributes = MambaParams;
  using Fields = MambaFieldList;
  static constexpr const char* kName = "Mamba2";
  static constexpr const char* kVersion = "1";
  static constexpr int32_t kNumOutputs = kNumMambaOutputs;
  static Attributes read(const nvinfer1::PluginFieldCollection* fields) {
    return read_mamba_fields(fields);
  }
  static const nvinfer1::PluginFieldCollection* names() { return mamba_field_names(); }
  static std::string describe(const Attributes& attributes) {
    return tensorrt::describe(attributes);
  }
};

class MambaPlugin final : public PluginBase<MambaTraits> {
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
  bool accepted_ = false;  // whether the inputs' types and fixed sizes were looked at
};

using MambaPluginCreator = PluginCreator<MambaPlugin, MambaTraits>;

}  // namespace adaptive_k::tensorrt
