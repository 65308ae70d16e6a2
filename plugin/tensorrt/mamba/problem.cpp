// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/mamba/problem.h"

#include <limits>
#include <sstream>

#include "tensorrt/fields.h"
#include "tensorrt/guard.h"
#include "tensorrt/moe/problem.h"

namespace adaptive_k::tensorrt {

using cpu::MambaInput;
using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

std::string describe(const MambaParams& params) {
  std::ostringstream text;
  text.precision(std::numeric_limits<float>::max_digits10);
  text << "n_groups=" << params.n_groups << " dt_min=" << params.dt_min
       << " dt_max=" << params.dt_max;
  return text.str();
}

MambaParams read_mamba_fields(const PluginFieldCollection* collection) {
  MambaParams params;
  for_each_field(collection, [&](const PluginField& field) {
    const std::string name = field.name;
    if (name == "n_groups") {
      params.n_groups = read_int(field);
    } else if (name == "dt_min") {
      params.dt_min = read_float(field);
    } else if (name == "dt_max") {
      params.dt_max = read_float(field);
    } else {
      fail_unknown(field, *mamba_field_names());
    }
  });
  if (const char* wrong = check_attributes(params, /*heads=*/0))
    fail(std::string("field ") + wrong + " (" + describe(params) + ")");
  return params;
}

const PluginFieldCollection* mamba_field_names() {
  static const PluginField kFields[] = {
      {"n_groups", nullptr, PluginFieldType::kINT32, 1},
      {"dt_min", nullptr, PluginFieldType::kFLOAT32, 1},
      {"dt_max", nullptr, PluginFieldType::kFLOAT32, 1},
  };
  static const PluginFieldCollection kCollection{
      static_cast<int32_t>(sizeof(kFields) / sizeof(kFields[0])), kFields};
  return &kCollection;
}

MambaFieldList::MambaFieldList(const MambaParams& params) : params_(params) {
  fields_.emplace_back("n_groups", &params_.n_groups, PluginFieldType::kINT32, 1);
  fields_.emplace_back("dt_min", &params_.dt_min, PluginFieldType::kFLOAT32, 1);
  fields_.emplace_back("dt_max", &params_.dt_max, PluginFieldType::kFLOAT32, 1);
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

void check_mamba_counts(int32_t num_inputs, int32_t num_outputs) {
  if (num_inputs != kNumMambaInputs)
    fail("has " + std::to_string(num_inputs) + " inputs but takes " +
         std::to_string(kNumMambaInputs));
  if (num_outputs != kNumMambaOutputs)
    fail("has " + std::to_string(num_outputs) +
         " outputs but makes 3: y, present_conv_state and present_ssm_state");
}

DataType expected_mamba_type(int32_t pos, DataType conv_input) {
  if (pos >= kNumMambaInputs)
    return pos - kNumMambaInputs == kPresentSsmState ? DataType::kFLOAT : conv_input;
  switch (static_cast<MambaInput>(pos)) {
    case MambaInput::kConvInput:
    case MambaInput::kDt:
    case MambaInput::kConvState:
      return conv_input;
    case MambaInput::kSubsequenceBegins:
    case MambaInput::kPastLens:
    case MambaInput::kStateSlots:
      return DataType::kINT32;
    default:
      return DataType::kFLOAT;
  }
}

void check_mamba_types(const DataType* types) {
  const DataType conv_input = types[0];
  if (conv_input != DataType::kFLOAT && conv_input != DataType::kHALF &&
      conv_input != DataType::kBF16)
    fail(std::string("input conv_input has type ") + type_name(conv_input) +
         " but must be float16, bfloat16 or float32");
  for (int32_t i = 0; i < kNumMambaInputs; ++i) {
    const DataType expected = expected_mamba_type(i, conv_input);
    if (types[i] == expected) continue;
    const auto input = static_cast<MambaInput>(i);
    const bool follows = input == MambaInput::kDt || input == MambaInput::kConvState;
    fail(std::string("input ") + cpu::mamba_input_name(i) + " has type " + type_name(types[i]) +
         " but must be " + type_name(expected) + (follows ? ", as conv_input" : ""));
  }
}

cuda::MambaShape make_mamba_shape(const MambaParams& params, const std::vector<Dimensions>& shapes,
                                  DataType conv_input) {
  cpu::Shape given[cpu::kMambaInputs];
  for (int32_t i = 0; i < kNumMambaInputs; ++i) given[i] = shapes[i];
  const cpu::MambaSizes sizes = cpu::check_mamba_shapes(params, given);
  if (sizes.heads < 0 || sizes.head_dim < 0 || sizes.state_size < 0 || sizes.taps < 0)
    fail(
        "the heads, their width, the state's size and the convolution's taps must be "
        "known when the engine is built");
  cuda::MambaShape shape;
  shape.tokens = sizes.tokens < 0 ? 0 : sizes.tokens;
  shape.sequences = narrow("number of sequences", sizes.sequences);
  shape.slots = narrow("number of slots", sizes.slots);
  shape.heads = narrow("number of heads", sizes.heads);
  shape.head_dim = narrow("heads' width", sizes.head_dim);
  shape.state_size = narrow("state's size", sizes.state_size);
  shape.taps = narrow("number of taps", sizes.taps);
  shape.element = element_type(conv_input);
  return shape;
}

}  // namespace adaptive_k::tensorrt
