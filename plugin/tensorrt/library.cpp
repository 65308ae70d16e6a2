// SPDX-License-Identifier: Apache-2.0
// What TensorRT looks for in a plugin library that it loads (trtexec --dynamicPlugins,
// IPluginRegistry::loadLibrary).
#include <NvInfer.h>

#include <cstdint>

#include "tensorrt/log.h"
#include "tensorrt/mamba/layer.h"
#include "tensorrt/moe/layer.h"
#include "tensorrt/plugin.h"

#define ADAPTIVE_K_EXPORT extern "C" __attribute__((visibility("default")))

// TensorRT's ONNX parser takes a plugin's namespace from the node's attribute plugin_namespace, not
// from its domain, and without the attribute it looks in "". So that both find an operator, each is
// there twice.
ADAPTIVE_K_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using namespace adaptive_k::tensorrt;  // NOLINT
  static PluginCreator<MoeLayer> unnamed(""), named("adaptive_k");
  static PluginCreator<MambaLayer> unnamed_mamba(""), named_mamba("adaptive_k");
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&unnamed, &named, &unnamed_mamba,
                                                                &named_mamba};
  count = sizeof(creators) / sizeof(creators[0]);
  return creators;
}

ADAPTIVE_K_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  adaptive_k::tensorrt::set_logger_finder(finder);
}
