// SPDX-License-Identifier: Apache-2.0
// AdaptiveKMoe as a TensorRT plugin: shapes, types, fields and a call into plugin/cuda.
//
// TensorRT calls across this boundary with no exceptions of its own, so no method lets one out:
// what is wrong becomes one sentence in TensorRT's log and a null pointer, a false or a nonzero
// status.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>

#include "fields.h"
#include "launcher.h"
#include "problem.h"

namespace adaptive_k::tensorrt {

constexpr const char* kPluginName = "AdaptiveKMoe";
constexpr const char* kPluginVersion = "1";

class AdaptiveKPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // plugin_namespace must outlive the plugin; it is the creator's, and an engine finds that creator
  // again by it.
  AdaptiveKPlugin(const Attributes& attributes, const char* plugin_namespace);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kPluginName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
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
  int32_t getNbOutputs() const noexcept override { return kNumOutputs; }
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
  // Checks what will run and remembers it. Throws std::invalid_argument.
  void accept_shapes(const nvinfer1::PluginTensorDesc* in, const Inputs& inputs);

  Attributes attributes_;
  const char* plugin_namespace_;
  std::string description_;
  std::unique_ptr<FieldList> serialized_;
  Inputs inputs_;         // count is 0 before any were accepted
  cuda::MoeShape shape_;  // of the last step; experts is 0 before the first
};

class AdaptiveKPluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit AdaptiveKPluginCreator(const char* plugin_namespace)
      : plugin_namespace_(plugin_namespace) {}

  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return kPluginName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kPluginVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

 private:
  const char* plugin_namespace_;
};

}  // namespace adaptive_k::tensorrt
