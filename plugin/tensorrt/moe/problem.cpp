// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/moe/problem.h"

#include <limits>
#include <string>

#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {
namespace {

using nvinfer1::DataType;

cuda::WeightStorage storage(WeightFields weights) {
  switch (weights) {
    case WeightFields::kInt8:
      return cuda::WeightStorage::kInt8;
    case WeightFields::kInt4:
      return cuda::WeightStorage::kInt4;
    default:
      return cuda::WeightStorage::kElement;
  }
}

// A 4-bit tensor as the shape of the values that it packs, two to a byte along the last dimension.
cpu::Shape unpacked(const Attributes& attributes, Dimensions shape) {
  if (attributes.weights == WeightFields::kInt4 && !shape.empty() && shape.back() > 0)
    shape.back() *= 2;
  return shape;
}

}  // namespace

cuda::ElementType element_type(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return cuda::ElementType::kFloat16;
    case DataType::kBF16:
      return cuda::ElementType::kBFloat16;
    default:
      return cuda::ElementType::kFloat32;
  }
}

int32_t narrow(const char* what, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max())
    fail(std::string("the ") + what + " " + std::to_string(size) + " does not fit in 32 bits");
  return static_cast<int32_t>(size < 0 ? 0 : size);
}

Inputs find_inputs(const Attributes& attributes, int32_t num_inputs) {
  const int32_t scales = is_quantised(attributes.weights) ? 2 : 0;
  const int32_t norms = attributes.has_expert_norms ? 1 : 0;
  const int32_t without_bias = kNumRequiredInputs + scales + norms;
  if (num_inputs != without_bias && num_inputs != without_bias + 1) {
    std::string sentence = "has " + std::to_string(num_inputs) + " inputs but takes " +
                           std::to_string(without_bias) + ", or " +
                           std::to_string(without_bias + 1) + " with correction_bias";
    if (scales) sentence += std::string(" (weight_format ") + word(attributes.weights) + ")";
    if (norms) sentence += " (has_expert_norms)";
    fail(sentence);
  }
  Inputs inputs;
  inputs.count = num_inputs;
  int32_t next = kNumRequiredInputs;
  if (num_inputs > without_bias) inputs.correction_bias = next++;
  if (scales) {
    inputs.up_scales = next++;
    inputs.down_scales = next++;
  }
  if (norms) inputs.expert_norms = next++;
  return inputs;
}

const char* input_name(const Attributes& attributes, const Inputs& inputs, int32_t index) {
  constexpr const char* kNames[] = {"hidden_states", "router_logits", "policy_index", "policy_kind",
                                    "thresholds",    "k_values",      "up",           "down"};
  const bool gated = is_gated(attributes.params.activation);
  if (index == kUp && gated) return "gate_up";
  if (index < kNumRequiredInputs) return kNames[index];
  if (index == inputs.correction_bias) return "correction_bias";
  if (index == inputs.expert_norms) return "expert_norms";
  if (index == inputs.down_scales) return "down_scales";
  return gated ? "gate_up_scales" : "up_scales";
}

const char* output_name(int32_t index) {
  constexpr const char* kNames[] = {"output", "k", "entropy"};
  return kNames[index];
}

const char* type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    default:
      return "another type";
  }
}

DataType expected_type(const Inputs& inputs, const Attributes& attributes, int32_t pos,
                       DataType hidden_states) {
  if (pos >= inputs.count) {
    switch (pos - inputs.count) {
      case kOutput:
        return hidden_states;
      case kK:
        return DataType::kINT32;
      default:
        return DataType::kFLOAT;
    }
  }
  switch (pos) {
    case kHiddenStates:
      return hidden_states;
    case kPolicyIndex:
    case kPolicyKind:
    case kKValues:
      return DataType::kINT32;
    case kRouterLogits:
    case kThresholds:
      return DataType::kFLOAT;
    case kUp:
    case kDown:
      return is_quantised(attributes.weights) ? DataType::kINT8 : hidden_states;
    default:
      return pos == inputs.correction_bias || pos == inputs.expert_norms ? DataType::kFLOAT
                                                                         : hidden_states;  // scales
  }
}

bool allows_hidden_states(const Attributes& attributes, DataType type) {
  switch (attributes.weights) {
    case WeightFields::kFloat32:
      return type == DataType::kFLOAT;
    case WeightFields::kFloat16:
      return type == DataType::kHALF;
    case WeightFields::kBFloat16:
      return type == DataType::kBF16;
    default:
      return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
  }
}

void check_input_types(const Attributes& attributes, const Inputs& inputs, const DataType* types) {
  if (!allows_hidden_states(attributes, types[kHiddenStates])) {
    const bool plain =
        !is_quantised(attributes.weights) && attributes.weights != WeightFields::kAsHiddenStates;
    fail(std::string("input hidden_states has type ") + type_name(types[kHiddenStates]) +
         " but must be " +
         (plain ? std::string(word(attributes.weights)) + ", by weight_format"
                : std::string("float16, bfloat16 or float32")));
  }
  for (int32_t i = 0; i < inputs.count; ++i) {
    const DataType expected = expected_type(inputs, attributes, i, types[kHiddenStates]);
    if (types[i] == expected) continue;
    const bool follows =
        (i == kUp || i == kDown || i == inputs.up_scales || i == inputs.down_scales) &&
        expected == types[kHiddenStates];
    fail(std::string("input ") + input_name(attributes, inputs, i) + " has type " +
         type_name(types[i]) + " but must be " + type_name(expected) +
         (follows ? ", as hidden_states" : ""));
  }
}

cpu::Sizes check_input_shapes(const Attributes& attributes, const Inputs& inputs,
                              const std::vector<Dimensions>& shapes) {
  cpu::InputShapes s;
  s.hidden_states = shapes[kHiddenStates];
  s.router_logits = shapes[kRouterLogits];
  s.policy_index = shapes[kPolicyIndex];
  s.policy_kind = shapes[kPolicyKind];
  s.thresholds = shapes[kThresholds];
  s.k_values = shapes[kKValues];
  s.up = unpacked(attributes, shapes[kUp]);
  s.down = unpacked(attributes, shapes[kDown]);
  s.has_correction_bias = inputs.correction_bias >= 0;
  if (s.has_correction_bias) s.correction_bias = shapes[inputs.correction_bias];
  s.has_scales = is_quantised(attributes.weights);
  if (s.has_scales) {
    s.up_scales = shapes[inputs.up_scales];
    s.down_scales = shapes[inputs.down_scales];
  }
  s.has_expert_norms = inputs.expert_norms >= 0;
  if (s.has_expert_norms) s.expert_norms = shapes[inputs.expert_norms];
  return cpu::check_shapes(attributes.params, s);
}

cuda::MoeShape make_shape(const Attributes& attributes, const Inputs& inputs,
                          const std::vector<Dimensions>& shapes, DataType hidden_states) {
  const cpu::Sizes sizes = check_input_shapes(attributes, inputs, shapes);
  if (sizes.hidden < 0 || sizes.intermediate < 0 || sizes.experts < 0)
    fail(
        "the hidden size, the intermediate size and the number of experts must be known when the "
        "engine is built");
  cuda::MoeShape shape;
  shape.tokens = sizes.tokens < 0 ? 0 : sizes.tokens;
  shape.hidden = narrow("hidden size", sizes.hidden);
  shape.intermediate = narrow("intermediate size", sizes.intermediate);
  shape.experts = narrow("number of experts", sizes.experts);
  shape.policies = narrow("number of policies", sizes.policies);
  shape.choices = narrow("number of choices", sizes.choices);
  shape.element = element_type(hidden_states);
  shape.weights = storage(attributes.weights);
  shape.group_size = narrow("group size", sizes.group_size);
  return shape;
}

}  // namespace adaptive_k::tensorrt
