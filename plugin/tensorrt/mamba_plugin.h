// SPDX-License-Identifier: Apache-2.0
// Mamba2 as a TensorRT plugin, built as AdaptiveKMoe's (adaptive_k_plugin.h).
//
// The states go in and come out, and whoever runs the engine binds both to one memory: then they
// are updated in place. Bound apart they come out whole as well. That a state's output aliases its
// input is not declared (IPluginV3OneBuildV2): TensorRT needs a preview feature for it, has it from
// 10.3 on only, and then may keep a copy of each state.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>

#include "mamba_problem.h"

namespace adaptive_k::tensorrt {

constexpr const char* kMambaPluginName = "Mamba2";
constexpr const char* kMambaPluginVersion = "1";

class MambaPlugin final : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuild,
                          public nvinfer1::IPluginV3OneRuntime {
 public:
  // plugin_namespace must outlive the plugin; it is the creator's.
  MambaPlugin(const MambaParams& params, const char* plugin_namespace);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kMambaPluginName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override {
    return kMambaPluginVersion;
  }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

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
  int32_t getNbOutputs() const noexcept override { return kNumMambaOutputs; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* out,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_desc,
                  const nvinfer1::PluginTensorDesc* output_desc, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  MambaParams params_;
  const char* plugin_namespace_;
  std::string description_;
  std::unique_ptr<MambaFieldList> serialized_;
  bool accepted_ = false;  // whether the inputs' types and fixed sizes were looked at
};

class MambaPluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit MambaPluginCreator(const char* plugin_namespace) : plugin_namespace_(plugin_namespace) {}

  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return mamba_field_names();
  }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kMambaPluginName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override {
    return kMambaPluginVersion;
  }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

 private:
  const char* plugin_namespace_;
};

}  // namespace adaptive_k::tensorrt
