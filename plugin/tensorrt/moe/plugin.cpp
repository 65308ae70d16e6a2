// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/moe/plugin.h"

#include <memory>
#include <string>
#include <vector>

#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

void check_outputs(int32_t num_outputs) {
  if (num_outputs != kNumOutputs)
    fail("has " + std::to_string(num_outputs) + " outputs but makes 3: output, k and entropy");
}

template <typename Desc>
void check_types(const Attributes& attributes, const Inputs& inputs, const Desc* in) {
  std::vector<DataType> types;
  for (int32_t i = 0; i < inputs.count; ++i) types.push_back(described(in[i]).type);
  check_input_types(attributes, inputs, types.data());
}

// The shape with the most tokens, policies and choices that the engine is built for.
cuda::MoeShape largest_shape(const Attributes& attributes, const Inputs& inputs,
                             const DynamicPluginTensorDesc* in) {
  return make_shape(
      attributes, inputs,
      shapes_of(in, inputs.count,
                [](const DynamicPluginTensorDesc& t) -> const Dims& { return t.max; }),
      in[kHiddenStates].desc.type);
}

void check_kernels_run(const Attributes& attributes, const cuda::MoeShape& shape) {
  if (const char* why_not = cuda::check(attributes.params, shape)) fail(why_not);
}

}  // namespace

nvinfer1::IPluginV3* AdaptiveKPlugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
    auto copy = std::make_unique<AdaptiveKPlugin>(attributes_, plugin_namespace_);
    copy->inputs_ = inputs_;
    return copy.release();
  });
}

int32_t AdaptiveKPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                         const DynamicPluginTensorDesc*,
                                         int32_t num_outputs) noexcept {
  inputs_ = Inputs();
  return guarded(kFailed, [&] {
    const Inputs inputs = find_inputs(attributes_, num_inputs);
    check_outputs(num_outputs);
    check_types(attributes_, inputs, in);
    check_kernels_run(attributes_, largest_shape(attributes_, inputs, in));
    inputs_ = inputs;
    shape_ = cuda::MoeShape();
    return 0;
  });
}

int32_t AdaptiveKPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                            const DataType* input_types,
                                            int32_t num_inputs) const noexcept {
  return guarded(kFailed, [&] {
    const Inputs inputs = find_inputs(attributes_, num_inputs);
    check_outputs(num_outputs);
    check_input_types(attributes_, inputs, input_types);
    for (int32_t i = 0; i < num_outputs; ++i)
      output_types[i] =
          expected_type(inputs, attributes_, num_inputs + i, input_types[kHiddenStates]);
    return 0;
  });
}

int32_t AdaptiveKPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t num_inputs,
                                         const nvinfer1::DimsExprs*, int32_t num_shape_inputs,
                                         nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                         nvinfer1::IExprBuilder&) noexcept {
  return guarded(kFailed, [&] {
    const Inputs inputs = find_inputs(attributes_, num_inputs);
    check_outputs(num_outputs);
    if (num_shape_inputs != 0) fail("takes no shape inputs");
    std::vector<Dimensions> shapes;
    for (int32_t i = 0; i < num_inputs; ++i) shapes.push_back(dimensions(in[i]));
    check_input_shapes(attributes_, inputs, shapes);

    const nvinfer1::IDimensionExpr* tokens = in[kHiddenStates].d[0];
    const nvinfer1::IDimensionExpr* hidden = in[kHiddenStates].d[1];
    outputs[kOutput].nbDims = 2;
    outputs[kOutput].d[0] = tokens;
    outputs[kOutput].d[1] = hidden;
    for (const int32_t per_token : {kK, kEntropy}) {
      outputs[per_token].nbDims = 1;
      outputs[per_token].d[0] = tokens;
    }
    return 0;
  });
}

bool AdaptiveKPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out,
                                                int32_t num_inputs, int32_t num_outputs) noexcept {
  return guarded(false, [&] {
    const Inputs inputs = find_inputs(attributes_, num_inputs);
    check_outputs(num_outputs);
    // A combination that does not fit is no error: TensorRT tries several.
    if (!is_linear(pos, in_out, num_inputs + num_outputs)) return false;
    const PluginTensorDesc& tensor = in_out[pos].desc;
    if (pos == kHiddenStates) return allows_hidden_states(attributes_, tensor.type);
    return tensor.type == expected_type(inputs, attributes_, pos, in_out[kHiddenStates].desc.type);
  });
}

size_t AdaptiveKPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                         const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guarded<size_t>(0, [&] {
    const cuda::MoeShape shape =
        largest_shape(attributes_, find_inputs(attributes_, num_inputs), in);
    check_kernels_run(attributes_, shape);
    return cuda::workspace_size(attributes_.params, shape);
  });
}

void AdaptiveKPlugin::accept_shapes(const PluginTensorDesc* in, const Inputs& inputs) {
  check_types(attributes_, inputs, in);
  const cuda::MoeShape shape = make_shape(
      attributes_, inputs,
      shapes_of(in, inputs.count, [](const PluginTensorDesc& t) -> const Dims& { return t.dims; }),
      in[kHiddenStates].type);
  check_kernels_run(attributes_, shape);
  inputs_ = inputs;
  shape_ = shape;
}

int32_t AdaptiveKPlugin::onShapeChange(const PluginTensorDesc* in, int32_t num_inputs,
                                       const PluginTensorDesc*, int32_t num_outputs) noexcept {
  inputs_ = Inputs();  // nothing runs until the new shapes have passed
  shape_ = cuda::MoeShape();
  return guarded(kFailed, [&] {
    const Inputs inputs = find_inputs(attributes_, num_inputs);
    check_outputs(num_outputs);
    accept_shapes(in, inputs);
    return 0;
  });
}

int32_t AdaptiveKPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                                 const void* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
  return guarded(kFailed, [&] {
    if (inputs_.count == 0) fail("was enqueued before its inputs were described and accepted");
    // onShapeChange() has been here already when TensorRT announces every change, as it says.
    const bool known = shape_.experts > 0 && input_desc[kHiddenStates].dims.d[0] == shape_.tokens &&
                       input_desc[kKValues].dims.d[0] == shape_.policies &&
                       input_desc[kKValues].dims.d[1] == shape_.choices;
    if (!known) accept_shapes(input_desc, Inputs(inputs_));
    const auto input = [&](int32_t index) { return index < 0 ? nullptr : inputs[index]; };
    cuda::MoeArguments a;
    a.hidden_states = input(kHiddenStates);
    a.router_logits = static_cast<const float*>(input(kRouterLogits));
    a.policy_index = static_cast<const int32_t*>(input(kPolicyIndex));
    a.policy_kind = static_cast<const int32_t*>(input(kPolicyKind));
    a.thresholds = static_cast<const float*>(input(kThresholds));
    a.k_values = static_cast<const int32_t*>(input(kKValues));
    a.up = input(kUp);
    a.down = input(kDown);
    a.up_scales = input(inputs_.up_scales);
    a.down_scales = input(inputs_.down_scales);
    a.correction_bias = static_cast<const float*>(input(inputs_.correction_bias));
    a.expert_norms = static_cast<const float*>(input(inputs_.expert_norms));
    a.output = outputs[kOutput];
    a.k = static_cast<int32_t*>(outputs[kK]);
    a.entropy = static_cast<float*>(outputs[kEntropy]);
    check_launched(cuda::launch(attributes_.params, shape_, a, workspace, stream));
    return 0;
  });
}

}  // namespace adaptive_k::tensorrt
