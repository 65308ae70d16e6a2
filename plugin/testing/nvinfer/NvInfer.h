// SPDX-License-Identifier: Apache-2.0
// The part of TensorRT's C++ interface that the plugin uses, declared anew so that the plugin can
// be compiled, driven and loaded where TensorRT's own headers cannot be had. For tests only: a
// library that is shipped is built with the headers of the TensorRT that loads it.
//
// What must agree with TensorRT is binary: the order of the virtual methods (a call goes by
// position), the layout of the plain structures and the values of the enumerations. Names agree as
// well, so that the plugin's sources compile with either.
// tests/tensorrt_plugin/test_nvinfer_header.py compares this file with real headers where they are
// at hand. Methods and values that nothing here uses are left out, except where a later one's
// position depends on them.
//
// TensorRT 11 gave the logger and its finder the versioned base class that the plugin interfaces
// have had since 10. NV_TENSORRT_MAJOR, 10 or 11, chooses between the two layouts.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(ADAPTIVE_K_SIMT)
#include "testing/simt/runtime.h"  // a host stand-in for cudaStream_t
#else
#include <cuda_runtime_api.h>
#endif

#ifndef NV_TENSORRT_MAJOR
#define NV_TENSORRT_MAJOR 11
#endif
static_assert(NV_TENSORRT_MAJOR == 10 || NV_TENSORRT_MAJOR == 11,
              "the interfaces declared here are those of TensorRT 10 and 11");

// Marks this file; TensorRT's own headers do not define it.
#define ADAPTIVE_K_NVINFER_FOR_TESTS 1

namespace nvinfer1 {

using AsciiChar = char;

// ------------------------------------------------------------------ plain data

enum class DataType : int32_t {
  kFLOAT = 0,
  kHALF = 1,
  kINT8 = 2,
  kINT32 = 3,
  kBOOL = 4,
  kUINT8 = 5,
  kFP8 = 6,
  kBF16 = 7,
  kINT64 = 8,
};

enum class TensorFormat : int32_t { kLINEAR = 0, kCHW32 = 5 };

class Dims64 {
 public:
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

// While an engine is built, a dimension may be unknown (-1 in desc.dims) but has bounds.
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min;
  Dims max;
  Dims opt;
};

enum class PluginFieldType : int32_t {
  kFLOAT16 = 0,
  kFLOAT32 = 1,
  kFLOAT64 = 2,
  kINT8 = 3,
  kINT16 = 4,
  kINT32 = 5,
  kCHAR = 6,
  kDIMS = 7,
  kUNKNOWN = 8,
  kBF16 = 9,
  kINT64 = 10,
};

// One named value or array. The owner of the memory is whoever made the field.
class PluginField {
 public:
  PluginField(const AsciiChar* name_ = nullptr, const void* data_ = nullptr,
              PluginFieldType type_ = PluginFieldType::kUNKNOWN, int32_t length_ = 0) noexcept
      : name(name_), data(data_), type(type_), length(length_) {}

  const AsciiChar* name;
  const void* data;
  PluginFieldType type;
  int32_t length;  // in elements of the type
};

struct PluginFieldCollection {
  int32_t nbFields{};
  const PluginField* fields{};
};

enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };

// ------------------------------------------------------------------ versioned interfaces

enum class APILanguage : int32_t { kCPP = 0, kPYTHON = 1 };

class InterfaceInfo {
 public:
  const char* kind;
  int32_t major;
  int32_t minor;
};

// TensorRT asks an object for its interface's name and version before it calls more of it, so the
// strings below must be the ones that TensorRT knows.
class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

// ------------------------------------------------------------------ logging

#if NV_TENSORRT_MAJOR >= 11
class ILogger : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
#else
class ILogger {
 public:
#endif
  enum class Severity : int32_t {
    kINTERNAL_ERROR = 0,
    kERROR = 1,
    kWARNING = 2,
    kINFO = 3,
    kVERBOSE = 4,
  };
  virtual void log(Severity severity, const AsciiChar* message) noexcept = 0;
#if NV_TENSORRT_MAJOR < 11
  virtual ~ILogger() = default;
#endif
};

#if NV_TENSORRT_MAJOR >= 11
class ILoggerFinder : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
#else
class ILoggerFinder {
 public:
#endif
  virtual ILogger* findLogger() = 0;
#if NV_TENSORRT_MAJOR < 11
  virtual ~ILoggerFinder() = default;
#endif
};

// ------------------------------------------------------------------ symbolic dimensions

class IDimensionExpr;
enum class DimensionOperation : int32_t { kSUM = 0, kPROD = 1 };

// TensorRT's public expression classes forward to these; a fake builder in the tests derives from
// them as TensorRT's own implementation does.
namespace apiv {

class VRoot {
 public:
  virtual ~VRoot() noexcept = default;
};

class VDimensionExpr : public VRoot {
 public:
  virtual bool isConstant() const = 0;
  virtual int64_t getConstantValue() const = 0;
  virtual bool isSizeTensor() const = 0;
};

class VExprBuilder : public VRoot {
 public:
  virtual const IDimensionExpr* constant(int64_t value) = 0;
  virtual const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                          const IDimensionExpr& second) = 0;
  virtual const IDimensionExpr* declareSizeTensor(int32_t output_index, const IDimensionExpr& opt,
                                                  const IDimensionExpr& upper) = 0;
};

}  // namespace apiv

class INoCopy {
 protected:
  INoCopy() = default;
  virtual ~INoCopy() = default;
  INoCopy(const INoCopy&) = delete;
  INoCopy& operator=(const INoCopy&) = delete;
};

class IDimensionExpr : public INoCopy {
 public:
  bool isConstant() const noexcept { return mImpl->isConstant(); }
  int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }
  bool isSizeTensor() const noexcept { return mImpl->isSizeTensor(); }

 protected:
  apiv::VDimensionExpr* mImpl;
};

class IExprBuilder : public INoCopy {
 public:
  const IDimensionExpr* constant(int64_t value) noexcept { return mImpl->constant(value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) noexcept {
    return mImpl->operation(op, first, second);
  }
  const IDimensionExpr* declareSizeTensor(int32_t output_index, const IDimensionExpr& opt,
                                          const IDimensionExpr& upper) {
    return mImpl->declareSizeTensor(output_index, opt, upper);
  }

 protected:
  apiv::VExprBuilder* mImpl;
};

class DimsExprs {
 public:
  int32_t nbDims;
  const IDimensionExpr* d[Dims::MAX_DIMS];
};

// ------------------------------------------------------------------ the plugin

class IPluginResourceContext;

class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
  virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual const AsciiChar* getPluginName() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  static constexpr int32_t kDEFAULT_FORMAT_COMBINATION_LIMIT = 100;

  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                  const DynamicPluginTensorDesc* out,
                                  int32_t num_outputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                     const DataType* input_types,
                                     int32_t num_inputs) const noexcept = 0;
  virtual int32_t getOutputShapes(const DimsExprs* inputs, int32_t num_inputs,
                                  const DimsExprs* shape_inputs, int32_t num_shape_inputs,
                                  DimsExprs* outputs, int32_t num_outputs,
                                  IExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out,
                                         int32_t num_inputs, int32_t num_outputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t,
                                  const DynamicPluginTensorDesc*, int32_t) const noexcept {
    return 0;
  }
  virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual const char* getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return kDEFAULT_FORMAT_COMBINATION_LIMIT; }
  virtual const char* getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override {
    return {"PLUGIN_V3ONE_RUNTIME", 1, 0};
  }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(const PluginTensorDesc* in, int32_t num_inputs,
                                const PluginTensorDesc* out, int32_t num_outputs) noexcept = 0;
  virtual int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc,
                          const void* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
  virtual const PluginFieldCollection* getFieldsToSerialize() noexcept = 0;
};

// ------------------------------------------------------------------ its creator

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override {
    return {"PLUGIN CREATOR_V3ONE", 1, 0};
  }
  virtual IPluginV3* createPlugin(const AsciiChar* name, const PluginFieldCollection* fields,
                                  TensorRTPhase phase) noexcept = 0;
  virtual const PluginFieldCollection* getFieldNames() noexcept = 0;
  virtual const AsciiChar* getPluginName() const noexcept = 0;
  virtual const AsciiChar* getPluginVersion() const noexcept = 0;
  virtual const AsciiChar* getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1

// TensorRT's own logger, for a plugin that is linked with it rather than loaded by it.
extern "C" nvinfer1::ILogger* getLogger() noexcept;
