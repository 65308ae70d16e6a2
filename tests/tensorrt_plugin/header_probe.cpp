// SPDX-License-Identifier: Apache-2.0
// Prints the binary layout of the TensorRT interfaces that the plugin uses, as the NvInfer.h before
// it on the include path declares them: the position of each virtual method and its signature, the
// sizes of structures and the places of their members, the values of enumerators and the
// interfaces' names.
#include <NvInfer.h>
#include <cxxabi.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <typeinfo>

using namespace nvinfer1;

namespace {

// By the C++ ABI of x86-64 and AArch64 Linux, a pointer to a virtual method holds its offset in the
// table: plus one on x86-64, as it is on AArch64, where the mark is in the second word.
template <typename Method>
long position(Method method) {
  static_assert(sizeof(method) == 2 * sizeof(long), "not a plain member pointer");
  long words[2];
  std::memcpy(words, &method, sizeof(method));
#if defined(__aarch64__)
  return words[0] / static_cast<long>(sizeof(void*));
#else
  return (words[0] - 1) / static_cast<long>(sizeof(void*));
#endif
}

template <typename T>
std::string type_text() {
  char* raw = abi::__cxa_demangle(typeid(T).name(), nullptr, nullptr, nullptr);
  std::string text(raw);
  std::free(raw);
  // TensorRT keeps versions of an interface apart by inner namespaces.
  for (const std::string inner : {"v_1_0::", "v_2_0::"})
    for (size_t at; (at = text.find(inner)) != std::string::npos;) text.erase(at, inner.size());
  return text;
}

template <typename Method>
void method(const char* name, Method m) {
  std::printf("method %s %ld %s\n", name, position(m), type_text<Method>().c_str());
}

template <typename Enum>
void value(const char* name, Enum e) {
  std::printf("value %s %d\n", name, static_cast<int>(e));
}

// How many positions the interface's own table has: one more method would take the next.
template <typename Interface>
struct OneMore : Interface {
  virtual void one_more();
};

// The name and version that an object of the interface answers with, without making one: the
// methods do not touch the object.
template <typename Interface>
void answers(const char* name, const Interface* object) {
  const InterfaceInfo info = object->Interface::getInterfaceInfo();
  std::printf("interface %s %s %d.%d\n", name, info.kind, static_cast<int>(info.major),
              static_cast<int>(info.minor));
}

}  // namespace

#define METHOD(type, name) method(#type "::" #name, &type::name)
#define SIZE(type) std::printf("size " #type " %zu aligned %zu\n", sizeof(type), alignof(type))
#define MEMBER(type, name)                                                         \
  std::printf("member " #type "::" #name " at %zu of %zu\n", offsetof(type, name), \
              sizeof(reinterpret_cast<type*>(0)->name))
#define LENGTH(type) std::printf("length " #type " %ld\n", position(&OneMore<type>::one_more))
#define VALUE(name) value(#name, name)
#define ANSWERS(type) answers(#type, reinterpret_cast<const type*>(place))

int main() {
  alignas(16) static char place[64] = {};

  METHOD(IVersionedInterface, getAPILanguage);
  METHOD(IVersionedInterface, getInterfaceInfo);
  METHOD(ILogger, log);
  METHOD(ILoggerFinder, findLogger);
  METHOD(apiv::VDimensionExpr, isConstant);
  METHOD(apiv::VDimensionExpr, getConstantValue);
  METHOD(apiv::VDimensionExpr, isSizeTensor);
  METHOD(apiv::VExprBuilder, constant);
  METHOD(apiv::VExprBuilder, operation);
  METHOD(apiv::VExprBuilder, declareSizeTensor);
  METHOD(IPluginV3, getCapabilityInterface);
  METHOD(IPluginV3, clone);
  METHOD(IPluginV3OneCore, getPluginName);
  METHOD(IPluginV3OneCore, getPluginVersion);
  METHOD(IPluginV3OneCore, getPluginNamespace);
  METHOD(IPluginV3OneBuild, configurePlugin);
  METHOD(IPluginV3OneBuild, getOutputDataTypes);
  METHOD(IPluginV3OneBuild, getOutputShapes);
  METHOD(IPluginV3OneBuild, supportsFormatCombination);
  METHOD(IPluginV3OneBuild, getNbOutputs);
  METHOD(IPluginV3OneBuild, getWorkspaceSize);
  METHOD(IPluginV3OneBuild, getValidTactics);
  METHOD(IPluginV3OneBuild, getNbTactics);
  METHOD(IPluginV3OneBuild, getTimingCacheID);
  METHOD(IPluginV3OneBuild, getFormatCombinationLimit);
  METHOD(IPluginV3OneBuild, getMetadataString);
  METHOD(IPluginV3OneRuntime, setTactic);
  METHOD(IPluginV3OneRuntime, onShapeChange);
  METHOD(IPluginV3OneRuntime, enqueue);
  METHOD(IPluginV3OneRuntime, attachToContext);
  METHOD(IPluginV3OneRuntime, getFieldsToSerialize);
  METHOD(IPluginCreatorV3One, createPlugin);
  METHOD(IPluginCreatorV3One, getFieldNames);
  METHOD(IPluginCreatorV3One, getPluginName);
  METHOD(IPluginCreatorV3One, getPluginVersion);
  METHOD(IPluginCreatorV3One, getPluginNamespace);

  SIZE(Dims);
  MEMBER(Dims, nbDims);
  MEMBER(Dims, d);
  SIZE(PluginTensorDesc);
  MEMBER(PluginTensorDesc, dims);
  MEMBER(PluginTensorDesc, type);
  MEMBER(PluginTensorDesc, format);
  MEMBER(PluginTensorDesc, scale);
  SIZE(DynamicPluginTensorDesc);
  MEMBER(DynamicPluginTensorDesc, desc);
  MEMBER(DynamicPluginTensorDesc, min);
  MEMBER(DynamicPluginTensorDesc, max);
  MEMBER(DynamicPluginTensorDesc, opt);
  SIZE(DimsExprs);
  MEMBER(DimsExprs, nbDims);
  MEMBER(DimsExprs, d);
  SIZE(PluginField);
  MEMBER(PluginField, name);
  MEMBER(PluginField, data);
  MEMBER(PluginField, type);
  MEMBER(PluginField, length);
  SIZE(PluginFieldCollection);
  MEMBER(PluginFieldCollection, nbFields);
  MEMBER(PluginFieldCollection, fields);
  SIZE(InterfaceInfo);
  MEMBER(InterfaceInfo, kind);
  MEMBER(InterfaceInfo, major);
  MEMBER(InterfaceInfo, minor);
  SIZE(IVersionedInterface);
  SIZE(ILogger);
  SIZE(ILoggerFinder);
  SIZE(IDimensionExpr);
  SIZE(IExprBuilder);
  SIZE(IPluginCapability);
  SIZE(IPluginV3);
  SIZE(IPluginV3OneCore);
  SIZE(IPluginV3OneBuild);
  SIZE(IPluginV3OneRuntime);
  SIZE(IPluginCreatorInterface);
  SIZE(IPluginCreatorV3One);

  LENGTH(IVersionedInterface);
  LENGTH(ILogger);
  LENGTH(ILoggerFinder);
  LENGTH(IDimensionExpr);
  LENGTH(IExprBuilder);
  LENGTH(apiv::VDimensionExpr);
  LENGTH(apiv::VExprBuilder);
  LENGTH(IPluginCapability);
  LENGTH(IPluginV3);
  LENGTH(IPluginV3OneCore);
  LENGTH(IPluginV3OneBuild);
  LENGTH(IPluginV3OneRuntime);
  LENGTH(IPluginCreatorInterface);
  LENGTH(IPluginCreatorV3One);

  VALUE(DataType::kFLOAT);
  VALUE(DataType::kHALF);
  VALUE(DataType::kINT8);
  VALUE(DataType::kINT32);
  VALUE(DataType::kBOOL);
  VALUE(DataType::kUINT8);
  VALUE(DataType::kFP8);
  VALUE(DataType::kBF16);
  VALUE(DataType::kINT64);
  VALUE(TensorFormat::kLINEAR);
  VALUE(TensorFormat::kCHW32);
  VALUE(PluginFieldType::kFLOAT16);
  VALUE(PluginFieldType::kFLOAT32);
  VALUE(PluginFieldType::kFLOAT64);
  VALUE(PluginFieldType::kINT8);
  VALUE(PluginFieldType::kINT16);
  VALUE(PluginFieldType::kINT32);
  VALUE(PluginFieldType::kCHAR);
  VALUE(PluginFieldType::kDIMS);
  VALUE(PluginFieldType::kUNKNOWN);
  VALUE(PluginFieldType::kBF16);
  VALUE(PluginFieldType::kINT64);
  VALUE(PluginCapabilityType::kCORE);
  VALUE(PluginCapabilityType::kBUILD);
  VALUE(PluginCapabilityType::kRUNTIME);
  VALUE(TensorRTPhase::kBUILD);
  VALUE(TensorRTPhase::kRUNTIME);
  VALUE(APILanguage::kCPP);
  VALUE(APILanguage::kPYTHON);
  VALUE(DimensionOperation::kSUM);
  VALUE(DimensionOperation::kPROD);
  VALUE(ILogger::Severity::kINTERNAL_ERROR);
  VALUE(ILogger::Severity::kERROR);
  VALUE(ILogger::Severity::kWARNING);
  VALUE(ILogger::Severity::kINFO);
  VALUE(ILogger::Severity::kVERBOSE);
  std::printf("value IPluginV3OneBuild::kDEFAULT_FORMAT_COMBINATION_LIMIT %d\n",
              static_cast<int>(IPluginV3OneBuild::kDEFAULT_FORMAT_COMBINATION_LIMIT));
  std::printf("value Dims::MAX_DIMS %d\n", static_cast<int>(Dims::MAX_DIMS));

  ANSWERS(IPluginV3);
  ANSWERS(IPluginV3OneCore);
  ANSWERS(IPluginV3OneBuild);
  ANSWERS(IPluginV3OneRuntime);
  ANSWERS(IPluginCreatorV3One);
  // Of the interfaces that TensorRT implements and the plugin calls, only 11 gives them names.
#if NV_TENSORRT_MAJOR >= 11
  ANSWERS(ILogger);
  ANSWERS(ILoggerFinder);
#endif
}
