// SPDX-License-Identifier: Apache-2.0
// What both plugins do at the boundary with TensorRT: no exception leaves it, and its descriptions
// become plain shapes.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensorrt/log.h"

namespace adaptive_k::tensorrt {

using Dimensions = std::vector<int64_t>;  // -1: not known yet

constexpr int32_t kFailed = 1;

[[noreturn]] inline void fail(const std::string& sentence) {
  throw std::invalid_argument(sentence);
}

inline void log_failure(const char* plugin, const std::string& sentence) noexcept {
  try {
    const std::string prefix = std::string(plugin) + ": ";
    const bool prefixed = sentence.compare(0, prefix.size(), prefix) == 0;
    log(Severity::kERROR, prefixed ? sentence : prefix + sentence);
  } catch (...) {
  }
}

// Runs the body of a method that TensorRT calls; what it throws is logged and becomes `failed`.
template <typename Result, typename Body>
Result guarded(const char* plugin, Result failed, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_failure(plugin, error.what());
  } catch (...) {
    log_failure(plugin, "failed for a reason that it did not name");
  }
  return failed;
}

inline Dimensions dimensions(const nvinfer1::Dims& dims) {
  const int32_t rank = std::min(std::max(dims.nbDims, 0), nvinfer1::Dims::MAX_DIMS);
  return Dimensions(dims.d, dims.d + rank);
}

inline Dimensions dimensions(const nvinfer1::DimsExprs& dims) {
  Dimensions shape;
  for (int32_t d = 0; d < std::min(dims.nbDims, nvinfer1::Dims::MAX_DIMS); ++d)
    shape.push_back(dims.d[d]->isConstant() ? dims.d[d]->getConstantValue() : -1);
  return shape;
}

inline const nvinfer1::PluginTensorDesc& described(const nvinfer1::PluginTensorDesc& tensor) {
  return tensor;
}
inline const nvinfer1::PluginTensorDesc& described(
    const nvinfer1::DynamicPluginTensorDesc& tensor) {
  return tensor.desc;
}

template <typename Desc, typename DimsOf>
std::vector<Dimensions> shapes_of(const Desc* tensors, int32_t count, const DimsOf& dims_of) {
  std::vector<Dimensions> shapes;
  for (int32_t i = 0; i < count; ++i) shapes.push_back(dimensions(dims_of(tensors[i])));
  return shapes;
}

}  // namespace adaptive_k::tensorrt
