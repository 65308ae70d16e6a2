// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/mamba/plugin.h"

#include <memory>
#include <vector>

#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {
namespace {

using cpu::MambaInput;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

template <typename Desc>
void check_types(const Desc* in) {
  std::vector<DataType> types;
  for (int32_t i = 0; i < kNumMambaInputs; ++i) types.push_back(described(in[i]).type);
  check_mamba_types(types.data());
}

cuda::MambaShape checked(const MambaParams& params, const std::vector<Dimensions>& shapes,
                         DataType conv_input) {
  const cuda::MambaShape shape = make_mamba_shape(params, shapes, conv_input);
  if (const char* why_not = cuda::check(params, shape)) fail(why_not);
  return shape;
}

// The shape with the most tokens that the engine is built for. The other sizes that change from
// step to step are left open, since each input has its own most of them, which need not belong
// together.
cuda::MambaShape largest_shape(const MambaParams& params, const DynamicPluginTensorDesc* in) {
  std::vector<Dimensions> shapes = shapes_of(
      in, kNumMambaInputs, [](const DynamicPluginTensorDesc& t) -> const Dims& { return t.max; });
  for (const MambaInput i :
       {MambaInput::kDt, MambaInput::kSubsequenceBegins, MambaInput::kPastLens,
        MambaInput::kStateSlots, MambaInput::kConvState, MambaInput::kSsmState}) {
    Dimensions& shape = shapes[static_cast<int32_t>(i)];
    if (!shape.empty()) shape[0] = -1;
  }
  return checked(params, shapes, in[0].desc.type);
}

cuda::MambaShape shape_of(const MambaParams& params, const PluginTensorDesc* in) {
  return checked(params,
                 shapes_of(in, kNumMambaInputs,
                           [](const PluginTensorDesc& t) -> const Dims& { return t.dims; }),
                 in[0].type);
}

}  // namespace

nvinfer1::IPluginV3* MambaPlugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(nullptr, [&]() -> nvinfer1::IPluginV3* {
    auto copy = std::make_unique<MambaPlugin>(attributes_, plugin_namespace_);
    copy->accepted_ = accepted_;
    return copy.release();
  });
}

int32_t MambaPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                     const DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
  accepted_ = false;
  return guarded(kFailed, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    check_types(in);
    largest_shape(attributes_, in);
    accepted_ = true;
    return 0;
  });
}

int32_t MambaPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                        const DataType* input_types,
                                        int32_t num_inputs) const noexcept {
  return guarded(kFailed, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    check_mamba_types(input_types);
    for (int32_t i = 0; i < num_outputs; ++i)
      output_types[i] = expected_mamba_type(num_inputs + i, input_types[0]);
    return 0;
  });
}

int32_t MambaPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t num_inputs,
                                     const nvinfer1::DimsExprs*, int32_t num_shape_inputs,
                                     nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                     nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(kFailed, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    if (num_shape_inputs != 0) fail("takes no shape inputs");
    cpu::Shape shapes[cpu::kMambaInputs];
    for (int32_t i = 0; i < num_inputs; ++i) shapes[i] = dimensions(in[i]);
    cpu::check_mamba_shapes(attributes_, shapes);

    const nvinfer1::IDimensionExpr* heads = in[kSsmStateInput].d[1];
    const nvinfer1::IDimensionExpr* head_dim = in[kSsmStateInput].d[3];
    outputs[kY].nbDims = 2;
    outputs[kY].d[0] = in[0].d[0];
    outputs[kY].d[1] =
        heads->isConstant() && head_dim->isConstant()
            ? builder.constant(heads->getConstantValue() * head_dim->getConstantValue())
            : builder.operation(nvinfer1::DimensionOperation::kPROD, *heads, *head_dim);
    outputs[kPresentConvState] = in[kConvStateInput];
    outputs[kPresentSsmState] = in[kSsmStateInput];
    return 0;
  });
}

bool MambaPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out,
                                            int32_t num_inputs, int32_t num_outputs) noexcept {
  return guarded(false, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    // A combination that does not fit is no error: TensorRT tries several.
    if (!is_linear(pos, in_out, num_inputs + num_outputs)) return false;
    const PluginTensorDesc& tensor = in_out[pos].desc;
    if (pos == 0)
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF ||
             tensor.type == DataType::kBF16;
    return tensor.type == expected_mamba_type(pos, in_out[0].desc.type);
  });
}

size_t MambaPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t num_inputs,
                                     const DynamicPluginTensorDesc*,
                                     int32_t num_outputs) const noexcept {
  return guarded<size_t>(0, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    return cuda::workspace_size(attributes_, largest_shape(attributes_, in));
  });
}

int32_t MambaPlugin::onShapeChange(const PluginTensorDesc* in, int32_t num_inputs,
                                   const PluginTensorDesc*, int32_t num_outputs) noexcept {
  accepted_ = false;  // nothing runs until the new shapes have passed
  return guarded(kFailed, [&] {
    check_mamba_counts(num_inputs, num_outputs);
    check_types(in);
    shape_of(attributes_, in);
    accepted_ = true;
    return 0;
  });
}

int32_t MambaPlugin::enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*,
                             const void* const* inputs, void* const* outputs, void* workspace,
                             cudaStream_t stream) noexcept {
  return guarded(kFailed, [&] {
    if (!accepted_) fail("was enqueued before its inputs were described and accepted");
    const cuda::MambaShape shape = shape_of(attributes_, input_desc);
    const auto input = [&](MambaInput i) { return inputs[static_cast<int32_t>(i)]; };
    const auto floats = [&](MambaInput i) { return static_cast<const float*>(input(i)); };
    const auto integers = [&](MambaInput i) { return static_cast<const int32_t*>(input(i)); };
    cuda::MambaArguments a;
    a.conv_input = input(MambaInput::kConvInput);
    a.dt = input(MambaInput::kDt);
    a.subsequence_begins = integers(MambaInput::kSubsequenceBegins);
    a.past_lens = integers(MambaInput::kPastLens);
    a.state_slots = integers(MambaInput::kStateSlots);
    a.conv_weight = floats(MambaInput::kConvWeight);
    a.conv_bias = floats(MambaInput::kConvBias);
    a.a = floats(MambaInput::kA);
    a.d = floats(MambaInput::kD);
    a.dt_bias = floats(MambaInput::kDtBias);
    a.conv_state = input(MambaInput::kConvState);
    a.ssm_state = floats(MambaInput::kSsmState);
    a.y = outputs[kY];
    a.present_conv_state = outputs[kPresentConvState];
    a.present_ssm_state = static_cast<float*>(outputs[kPresentSsmState]);
    check_launched(cuda::launch(attributes_, shape, a, workspace, stream));
    return 0;
  });
}

}  // namespace adaptive_k::tensorrt
