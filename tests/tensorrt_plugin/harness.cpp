// SPDX-License-Identifier: Apache-2.0
// TensorRT's part in the tests: loads a plugin library, and calls its creators and plugins as
// TensorRT would, through the interfaces alone. A C interface for ctypes; see plugin_harness.py.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace nvinfer1;

namespace {

std::string g_log;
bool g_has_logger = true;

class RecordingLogger : public ILogger {
 public:
  void log(Severity severity, const AsciiChar* message) noexcept override {
    g_log += std::to_string(static_cast<int>(severity)) + "\t" + message + "\n";
  }
};

class RecordingFinder : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return g_has_logger ? &logger_ : nullptr; }

 private:
  RecordingLogger logger_;
};

RecordingFinder g_finder;

// A returned text lives until the next one of its kind.
const char* keep(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

// A dimension that is a number or a name, made as TensorRT makes its own.
class Expression final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  Expression(bool constant, int64_t value, std::string name)
      : constant_(constant), value_(value), name_(std::move(name)) {
    mImpl = this;
  }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }
  std::string text() const { return constant_ ? std::to_string(value_) : name_; }

 private:
  bool constant_;
  int64_t value_;
  std::string name_;
};

class Expressions final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  Expressions() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override { return make(true, value, ""); }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) override {
    return make(false, 0, "operation");
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return make(false, 0, "size tensor");
  }
  const IDimensionExpr* make(bool is_constant, int64_t value, const std::string& name) {
    made_.push_back(std::make_unique<Expression>(is_constant, value, name));
    return made_.back().get();
  }

 private:
  std::vector<std::unique_ptr<Expression>> made_;
};

struct Library {
  void* handle;
  IPluginCreatorInterface* const* creators;
  int32_t count;

  IPluginCreatorV3One* creator(int32_t i) const {
    return static_cast<IPluginCreatorV3One*>(creators[i]);
  }
};

template <typename T>
T* capability(void* plugin, PluginCapabilityType type) {
  return static_cast<T*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}
IPluginV3OneCore* core(void* p) {
  return capability<IPluginV3OneCore>(p, PluginCapabilityType::kCORE);
}
IPluginV3OneBuild* build(void* p) {
  return capability<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(void* p) {
  return capability<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME);
}

std::string interface_text(const IVersionedInterface& object) {
  const InterfaceInfo info = object.getInterfaceInfo();
  return std::string(info.kind) + " " + std::to_string(info.major) + "." +
         std::to_string(info.minor) +
         (object.getAPILanguage() == APILanguage::kCPP ? " C++" : " not C++");
}

}  // namespace

// Mirrored in plugin_harness.py.
struct Tensor {
  int32_t rank;
  int32_t type;
  int32_t format;
  int32_t padding;
  int64_t dims[8];
  int64_t max[8];
};
struct Field {
  const char* name;
  const void* data;
  int32_t type;
  int32_t length;
};

namespace {

Dims dims_of(int32_t rank, const int64_t* sizes) {
  Dims dims{};
  dims.nbDims = rank;
  std::memcpy(dims.d, sizes, sizeof(dims.d));
  return dims;
}

PluginTensorDesc describe(const Tensor& t) {
  return {dims_of(t.rank, t.dims), static_cast<DataType>(t.type),
          static_cast<TensorFormat>(t.format), 1.0f};
}

std::vector<PluginTensorDesc> describe(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> out;
  for (int32_t i = 0; i < count; ++i) out.push_back(describe(tensors[i]));
  return out;
}

std::vector<DynamicPluginTensorDesc> describe_dynamic(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> out;
  for (int32_t i = 0; i < count; ++i) {
    DynamicPluginTensorDesc d{};
    d.desc = describe(tensors[i]);
    d.max = d.opt = d.min = dims_of(tensors[i].rank, tensors[i].max);
    out.push_back(d);
  }
  return out;
}

}  // namespace

EXPORT void* library_open(const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    g_log += std::string("0\t") + dlerror() + "\n";
    return nullptr;
  }
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
  auto get_creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
  if (set_logger_finder == nullptr || get_creators == nullptr) {
    g_log += "0\tan entry point is missing\n";
    return nullptr;
  }
  set_logger_finder(&g_finder);
  auto* library = new Library{handle, nullptr, 0};
  library->creators = get_creators(library->count);
  return library;
}

EXPORT void set_has_logger(int32_t has_logger) { g_has_logger = has_logger != 0; }

EXPORT const char* take_log() {
  static std::string taken;
  taken.swap(g_log);
  g_log.clear();
  return taken.c_str();
}

EXPORT int32_t creator_count(void* library) { return static_cast<Library*>(library)->count; }

EXPORT const char* creator_text(void* library, int32_t i) {
  IPluginCreatorV3One* c = static_cast<Library*>(library)->creator(i);
  std::string text = std::string(c->getPluginName()) + "\t" + c->getPluginVersion() + "\t" +
                     c->getPluginNamespace() + "\t" + interface_text(*c);
  const PluginFieldCollection* names = c->getFieldNames();
  for (int32_t f = 0; f < names->nbFields; ++f)
    text += std::string("\t") + names->fields[f].name + ":" +
            std::to_string(static_cast<int>(names->fields[f].type));
  return keep(text);
}

// count -1: no collection at all.
EXPORT void* plugin_create(void* library, int32_t i, const char* name, const Field* fields,
                           int32_t count, int32_t phase) {
  std::vector<PluginField> list;
  for (int32_t f = 0; fields != nullptr && f < count; ++f)
    list.emplace_back(fields[f].name, fields[f].data, static_cast<PluginFieldType>(fields[f].type),
                      fields[f].length);
  const PluginFieldCollection collection{count, fields == nullptr ? nullptr : list.data()};
  return static_cast<Library*>(library)->creator(i)->createPlugin(
      name, count == -1 ? nullptr : &collection, static_cast<TensorRTPhase>(phase));
}

EXPORT void plugin_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

EXPORT void* plugin_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

EXPORT void* plugin_attach(void* plugin) { return runtime(plugin)->attachToContext(nullptr); }

EXPORT const char* plugin_text(void* plugin) {
  const auto unknown = static_cast<PluginCapabilityType>(7);
  return keep(std::string(core(plugin)->getPluginName()) + "\t" + core(plugin)->getPluginVersion() +
              "\t" + core(plugin)->getPluginNamespace() + "\t" + build(plugin)->getTimingCacheID() +
              "\t" + build(plugin)->getMetadataString() + "\t" +
              interface_text(*static_cast<IPluginV3*>(plugin)) + "\t" +
              interface_text(*core(plugin)) + "\t" + interface_text(*build(plugin)) + "\t" +
              interface_text(*runtime(plugin)) + "\t" +
              (capability<void>(plugin, unknown) == nullptr ? "none" : "some"));
}

EXPORT int32_t plugin_num_outputs(void* plugin) { return build(plugin)->getNbOutputs(); }

EXPORT int32_t plugin_num_tactics(void* plugin) { return build(plugin)->getNbTactics(); }

// The serialized fields, one a line: name, type, length and bytes in hexadecimal.
EXPORT const char* plugin_fields(void* plugin) {
  constexpr int kSizes[] = {2, 4, 8, 1, 2, 4, 1, 0, 0, 2, 8};
  const PluginFieldCollection* fields = runtime(plugin)->getFieldsToSerialize();
  std::string text;
  for (int32_t f = 0; f < fields->nbFields; ++f) {
    const PluginField& field = fields->fields[f];
    text += std::string(field.name) + "\t" + std::to_string(static_cast<int>(field.type)) + "\t" +
            std::to_string(field.length) + "\t";
    const int bytes = kSizes[static_cast<int>(field.type)] * field.length;
    for (int b = 0; b < bytes; ++b) {
      char digits[3];
      std::snprintf(digits, sizeof(digits), "%02x",
                    static_cast<const unsigned char*>(field.data)[b]);
      text += digits;
    }
    text += "\n";
  }
  return keep(text);
}

EXPORT int32_t plugin_output_types(void* plugin, const int32_t* in, int32_t num_inputs,
                                   int32_t* out, int32_t num_outputs) {
  return build(plugin)->getOutputDataTypes(reinterpret_cast<DataType*>(out), num_outputs,
                                           reinterpret_cast<const DataType*>(in), num_inputs);
}

// The output shapes as text, "a b;c;d"; a dimension unknown in the input is named input.axis.
EXPORT int32_t plugin_output_shapes(void* plugin, const Tensor* in, int32_t num_inputs,
                                    int32_t num_shape_inputs, int32_t num_outputs,
                                    const char** text) {
  Expressions expressions;
  std::vector<DimsExprs> inputs(num_inputs), outputs(num_outputs);
  for (int32_t i = 0; i < num_inputs; ++i) {
    inputs[i].nbDims = in[i].rank;
    for (int32_t d = 0; d < in[i].rank; ++d)
      inputs[i].d[d] = expressions.make(in[i].dims[d] >= 0, in[i].dims[d],
                                        std::to_string(i) + "." + std::to_string(d));
  }
  const int32_t status =
      build(plugin)->getOutputShapes(inputs.data(), num_inputs, inputs.data(), num_shape_inputs,
                                     outputs.data(), num_outputs, expressions);
  std::string shapes;
  for (int32_t o = 0; status == 0 && o < num_outputs; ++o) {
    for (int32_t d = 0; d < outputs[o].nbDims; ++d)
      shapes += (d ? " " : "") + static_cast<const Expression*>(outputs[o].d[d])->text();
    shapes += ";";
  }
  *text = keep(shapes);
  return status;
}

EXPORT int32_t plugin_supports(void* plugin, int32_t pos, const Tensor* tensors, int32_t num_inputs,
                               int32_t num_outputs) {
  const auto all = describe_dynamic(tensors, num_inputs + num_outputs);
  return build(plugin)->supportsFormatCombination(pos, all.data(), num_inputs, num_outputs);
}

EXPORT int32_t plugin_configure(void* plugin, const Tensor* tensors, int32_t num_inputs,
                                int32_t num_outputs) {
  const auto all = describe_dynamic(tensors, num_inputs + num_outputs);
  return build(plugin)->configurePlugin(all.data(), num_inputs, all.data() + num_inputs,
                                        num_outputs);
}

EXPORT size_t plugin_workspace(void* plugin, const Tensor* tensors, int32_t num_inputs,
                               int32_t num_outputs) {
  const auto all = describe_dynamic(tensors, num_inputs + num_outputs);
  return build(plugin)->getWorkspaceSize(all.data(), num_inputs, all.data() + num_inputs,
                                         num_outputs);
}

EXPORT int32_t plugin_shape_change(void* plugin, const Tensor* tensors, int32_t num_inputs,
                                   int32_t num_outputs) {
  const auto all = describe(tensors, num_inputs + num_outputs);
  return runtime(plugin)->onShapeChange(all.data(), num_inputs, all.data() + num_inputs,
                                        num_outputs);
}

EXPORT int32_t plugin_enqueue(void* plugin, const Tensor* tensors, int32_t num_inputs,
                              int32_t num_outputs, const void* const* in, void* const* out,
                              void* workspace, void* stream) {
  const auto all = describe(tensors, num_inputs + num_outputs);
  return runtime(plugin)->enqueue(all.data(), all.data() + num_inputs, in, out, workspace,
                                  static_cast<cudaStream_t>(stream));
}
