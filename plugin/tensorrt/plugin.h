// SPDX-License-Identifier: Apache-2.0
// The plugins as TensorRT sees them: everything that follows from an operator's table. What is left
// to a plugin is in its Layer:
//   Op                 the operator's description
//   Shape              what the kernels take
//   shape(sizes, type) the kernels' shape; throws where a size that must be known is not
//   leave_open(shapes) of the largest shapes: forgets the sizes that need not belong together
//   output_shapes(...) as IPluginV3OneBuild::getOutputShapes
//   launch(...)        the call into plugin/cuda
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
#include <vector>

#include "operator/shapes.h"
#include "tensorrt/fields.h"
#include "tensorrt/guard.h"
#include "tensorrt/log.h"
#include "tensorrt/types.h"

namespace adaptive_k::tensorrt {

template <typename Layer>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  using Op = typename Layer::Op;
  using Params = typename Op::Params;
  using DynamicDesc = nvinfer1::DynamicPluginTensorDesc;
  using Desc = nvinfer1::PluginTensorDesc;

  // plugin_namespace must outlive the plugin; it is the creator's, and an engine finds that creator
  // again by it.
  Plugin(const Params& params, const char* plugin_namespace)
      : params_(params), plugin_namespace_(plugin_namespace), description_(describe<Op>(params)) {}

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
  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
      auto copy = std::make_unique<Plugin>(params_, plugin_namespace_);
      copy->inputs_ = inputs_;
      return copy.release();
    });
  }

  // IPluginV3OneCore
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return Op::kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return kNumOutputs<Op>; }
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  int32_t configurePlugin(const DynamicDesc* in, int32_t num_inputs, const DynamicDesc*,
                          int32_t num_outputs) noexcept override {
    forget();
    return guarded(kFailed, [&] {
      const CallInputs<Op> inputs = checked(num_inputs, num_outputs, in);
      largest_shape(inputs, in);
      inputs_ = inputs;
      return 0;
    });
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override {
    return guarded(kFailed, [&] {
      const CallInputs<Op> inputs = find_inputs<Op>(params_, num_inputs);
      check_outputs(num_outputs);
      check_types<Op>(params_, inputs, input_types);
      for (int32_t i = 0; i < num_outputs; ++i)
        output_types[i] = expected_type<Op>(params_, inputs, num_inputs + i, input_types[0]);
      return 0;
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t num_inputs,
                          const nvinfer1::DimsExprs*, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(kFailed, [&] {
      const CallInputs<Op> inputs = find_inputs<Op>(params_, num_inputs);
      check_outputs(num_outputs);
      if (num_shape_inputs != 0) fail("takes no shape inputs");
      std::vector<Dimensions> shapes;
      for (int32_t i = 0; i < num_inputs; ++i) shapes.push_back(dimensions(in[i]));
      check_shapes(params_, by_place(inputs, shapes));
      Layer::output_shapes(in, builder, outputs);
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t pos, const DynamicDesc* in_out, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    return guarded(false, [&] {
      const CallInputs<Op> inputs = find_inputs<Op>(params_, num_inputs);
      check_outputs(num_outputs);
      const int32_t count = num_inputs + num_outputs;
      if (pos < 0 || pos >= count)
        fail("was asked for the format of tensor " + std::to_string(pos) + " of " +
             std::to_string(count));
      // A combination that does not fit is no error: TensorRT tries several.
      const Desc& tensor = in_out[pos].desc;
      if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
      if (pos == 0) return allows_element(Op::weight_format(params_), tensor.type);
      return tensor.type == expected_type<Op>(params_, inputs, pos, in_out[0].desc.type);
    });
  }

  size_t getWorkspaceSize(const DynamicDesc* in, int32_t num_inputs, const DynamicDesc*,
                          int32_t num_outputs) const noexcept override {
    return guarded<size_t>(0, [&] {
      const CallInputs<Op> inputs = find_inputs<Op>(params_, num_inputs);
      check_outputs(num_outputs);
      return cuda::workspace_size(params_, largest_shape(inputs, in));
    });
  }

  // IPluginV3OneRuntime
  int32_t onShapeChange(const Desc* in, int32_t num_inputs, const Desc*,
                        int32_t num_outputs) noexcept override {
    forget();  // nothing runs until the new shapes have passed
    return guarded(kFailed, [&] {
      accept(checked(num_inputs, num_outputs, in), in);
      return 0;
    });
  }

  int32_t enqueue(const Desc* input_desc, const Desc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(kFailed, [&] {
      if (inputs_.count == 0) fail("was enqueued before its inputs were described and accepted");
      // onShapeChange() has been here already when TensorRT announces every change, as it says.
      if (!same_shapes(input_desc)) accept(CallInputs<Op>(inputs_), input_desc);
      Addresses<typename Op::Input> addresses;
      for (int32_t i = 0; i < inputs_.count; ++i) addresses.at[inputs_.place[i]] = inputs[i];
      const cudaError_t status =
          Layer::launch(params_, shape_, addresses, outputs, workspace, stream);
      if (status != cudaSuccess)
        fail("its kernels were not launched (CUDA error " + std::to_string(status) + ")");
      return 0;
    });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>(nullptr, [&] {
      serialized_ = std::make_unique<FieldList<Op>>(params_);
      return serialized_->collection();
    });
  }

  static constexpr const char* kVersion = "1";

 private:
  template <typename Result, typename Body>
  static Result guarded(Result failed, const Body& body) noexcept {
    return tensorrt::guarded(Op::kName, failed, body);
  }

  static void check_outputs(int32_t num_outputs) {
    if (num_outputs == kNumOutputs<Op>) return;
    std::string names;
    for (int32_t i = 0; i < kNumOutputs<Op>; ++i)
      names += (i == 0                    ? ""
                : i + 1 < kNumOutputs<Op> ? ", "
                                          : " and ") +
               std::string(Op::kOutputs[i].name);
    fail("has " + std::to_string(num_outputs) + " outputs but makes " +
         std::to_string(kNumOutputs<Op>) + ": " + names);
  }

  template <typename AnyDesc>
  CallInputs<Op> checked(int32_t num_inputs, int32_t num_outputs, const AnyDesc* in) const {
    const CallInputs<Op> inputs = find_inputs<Op>(params_, num_inputs);
    check_outputs(num_outputs);
    check_described_types(inputs, in);
    return inputs;
  }

  template <typename AnyDesc>
  void check_described_types(const CallInputs<Op>& inputs, const AnyDesc* in) const {
    std::vector<nvinfer1::DataType> types;
    for (int32_t i = 0; i < inputs.count; ++i) types.push_back(described(in[i]).type);
    check_types<Op>(params_, inputs, types.data());
  }

  // Shapes by the table's places, those of weights in values: TensorRT's are of bytes.
  Shapes<Op> by_place(const CallInputs<Op>& inputs, const std::vector<Dimensions>& given) const {
    Shapes<Op> shapes;
    const WeightFormat format = Op::weight_format(params_);
    for (int32_t i = 0; i < inputs.count; ++i) {
      const int32_t place = inputs.place[i];
      shapes[place] = given[i];
      if (Op::kInputs[place].type == TypeRule::kWeights && is_quantised(format))
        shapes[place] = in_values(shapes[place], 8, bits_of(format));
    }
    return shapes;
  }

  typename Layer::Shape kernel_shape(const CallInputs<Op>& inputs,
                                     const std::vector<Dimensions>& shapes,
                                     nvinfer1::DataType element) const {
    const typename Layer::Shape shape =
        Layer::shape(check_shapes(params_, by_place(inputs, shapes)), element_type(element));
    if (const char* why_not = cuda::check(params_, shape)) fail(why_not);
    return shape;
  }

  // The shape with the largest sizes that the engine is built for.
  typename Layer::Shape largest_shape(const CallInputs<Op>& inputs, const DynamicDesc* in) const {
    std::vector<Dimensions> shapes = shapes_of(
        in, inputs.count, [](const DynamicDesc& t) -> const nvinfer1::Dims& { return t.max; });
    Layer::leave_open(&shapes);
    return kernel_shape(inputs, shapes, in[0].desc.type);
  }

  // Checks what will run and remembers it.
  void accept(const CallInputs<Op>& inputs, const Desc* in) {
    check_described_types(inputs, in);
    std::vector<Dimensions> shapes =
        shapes_of(in, inputs.count, [](const Desc& t) -> const nvinfer1::Dims& { return t.dims; });
    shape_ = kernel_shape(inputs, shapes, in[0].type);
    inputs_ = inputs;
    accepted_ = std::move(shapes);
  }

  bool same_shapes(const Desc* in) const {
    if (accepted_.size() != static_cast<size_t>(inputs_.count)) return false;
    for (size_t i = 0; i < accepted_.size(); ++i) {
      if (static_cast<size_t>(in[i].dims.nbDims) != accepted_[i].size()) return false;
      for (size_t d = 0; d < accepted_[i].size(); ++d)
        if (in[i].dims.d[d] != accepted_[i][d]) return false;
    }
    return true;
  }

  void forget() {
    inputs_ = CallInputs<Op>();
    accepted_.clear();
  }

  const Params params_;
  const char* const plugin_namespace_;
  const std::string description_;
  CallInputs<Op> inputs_;             // count is 0 before any were accepted
  std::vector<Dimensions> accepted_;  // of the last step's inputs; empty before the first
  typename Layer::Shape shape_;       // that follows from them
  std::unique_ptr<FieldList<Op>> serialized_;
};

template <typename Layer>
class PluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  using Op = typename Layer::Op;

  explicit PluginCreator(const char* plugin_namespace) : plugin_namespace_(plugin_namespace) {}

  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>(Op::kName, nullptr, [&]() -> nvinfer1::IPluginV3* {
      try {
        const typename Op::Params params = read_fields<Op>(fields);
        log(Severity::kVERBOSE,
            std::string(Op::kName) + ": layer " + (name ? name : "") + ": " + describe<Op>(params));
        return new Plugin<Layer>(params, plugin_namespace_);
      } catch (const std::invalid_argument& error) {
        if (name == nullptr || *name == '\0') throw;
        fail(std::string("layer ") + name + ": " + error.what());
      }
    });
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return field_names<Op>();
  }
  const nvinfer1::AsciiChar* getPluginName() const noexcept override { return Op::kName; }
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override {
    return Plugin<Layer>::kVersion;
  }
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override {
    return plugin_namespace_;
  }

 private:
  const char* plugin_namespace_;
};

}  // namespace adaptive_k::tensorrt
