// SPDX-License-Identifier: Apache-2.0
// What the plugins have in common as TensorRT sees them: everything but their tensors and kernels.
//
// TensorRT calls across this boundary with no exceptions of its own, so no method lets one out:
// what is wrong becomes one sentence in TensorRT's log and a null pointer, a false or a nonzero
// status.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "tensorrt/guard.h"
#include "tensorrt/log.h"

namespace adaptive_k::tensorrt {

// A plugin over what Traits says of it:
//   kName, kVersion    as TensorRT's registry has them
//   kNumOutputs        of the layer
//   Attributes         the layer's
//   Fields             attributes as fields that read() takes back, in collection()
//   read(collection)   attributes of fields; throws std::invalid_argument
//   names()            the names and types of all fields
//   describe(a)        one line that holds exactly what tells two plugins apart
template <typename Traits>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  using Attributes = typename Traits::Attributes;

  // plugin_namespace must outlive the plugin; it is the creator's, and an engine finds that creator
  // again by it.
  PluginBase(const Attributes& attributes, const char* plugin_namespace)
      : attributes_(attributes),
        plugin_namespace_(plugin_namespace),
        description_(Traits::describe(attributes)) {}

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  // IPluginV3OneCore
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return Traits::kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return Traits::kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return Traits::kNumOutputs; }
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  // IPluginV3OneRuntime
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>(nullptr, [&] {
      serialized_ = std::make_unique<typename Traits::Fields>(attributes_);
      return serialized_->collection();
    });
  }

 protected:
  template <typename Result, typename Body>
  static Result guarded(Result failed, const Body& body) noexcept {
    return tensorrt::guarded(Traits::kName, failed, body);
  }

  // Whether tensor pos (inputs first, then outputs) is described as packed. Throws where there is
  // no such tensor.
  static bool is_linear(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* in_out,
                        int32_t count) {
    if (pos < 0 || pos >= count)
      fail("was asked for the format of tensor " + std::to_string(pos) + " of " +
           std::to_string(count));
    return in_out[pos].desc.format == nvinfer1::TensorFormat::kLINEAR;
  }

  static void check_launched(cudaError_t status) {
    if (status != cudaSuccess)
      fail("its kernels were not launched (CUDA error " + std::to_string(status) + ")");
  }

  Attributes attributes_;
  const char* plugin_namespace_;

 private:
  std::string description_;
  std::unique_ptr<typename Traits::Fields> serialized_;
};

// The creator of a plugin over Traits.
template <typename Plugin, typename Traits>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit PluginCreator(const char* plugin_namespace) : plugin_namespace_(plugin_namespace) {}

  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(Traits::kName, nullptr, [&]() -> nvinfer1::IPluginV3* {
      try {
        const typename Traits::Attributes attributes = Traits::read(fields);
        log(Severity::kVERBOSE, std::string(Traits::kName) + ": layer " + (name ? name : "") +
                                    ": " + Traits::describe(attributes));
        return new Plugin(attributes, plugin_namespace_);
      } catch (const std::invalid_argument& error) {
        if (name == nullptr || *name == '\0') throw;
        fail(std::string("layer ") + name + ": " + error.what());
      }
    });
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return Traits::names();
  }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return Traits::kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return Traits::kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

 private:
  const char* plugin_namespace_;
};

}  // namespace adaptive_k::tensorrt
