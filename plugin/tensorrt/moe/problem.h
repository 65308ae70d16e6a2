// SPDX-License-Identifier: Apache-2.0
// From the tensors that TensorRT describes to the shape that the kernels take, with every check
// between them. All functions throw std::invalid_argument with a sentence.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <vector>

#include "cuda/moe/launcher.h"
#include "operator/moe/shapes.h"
#include "tensorrt/fields.h"

namespace adaptive_k::tensorrt {

// The inputs that every layer has, in order. correction_bias follows if there is one (the number of
// inputs tells), then up_scales and down_scales if the weights are quantised, then expert_norms if
// the attribute says so.
enum Input : int32_t {
  kHiddenStates,
  kRouterLogits,
  kPolicyIndex,
  kPolicyKind,
  kThresholds,
  kKValues,
  kUp,
  kDown,
  kNumRequiredInputs,
};

enum Output : int32_t { kOutput, kK, kEntropy, kNumOutputs };

// Which of the optional inputs are there, and where; -1 where not.
struct Inputs {
  int32_t count = 0;
  int32_t correction_bias = -1;
  int32_t up_scales = -1;
  int32_t down_scales = -1;
  int32_t expert_norms = -1;
};

Inputs find_inputs(const Attributes& attributes, int32_t num_inputs);

// The input's name in the operator's description.
const char* input_name(const Attributes& attributes, const Inputs& inputs, int32_t index);

const char* output_name(int32_t index);

// The type that a tensor (inputs first, then outputs) must have, given that of hidden_states.
nvinfer1::DataType expected_type(const Inputs& inputs, const Attributes& attributes, int32_t pos,
                                 nvinfer1::DataType hidden_states);

// The name of a type as the sentences have it.
const char* type_name(nvinfer1::DataType type);

// The kernels' name for a float type.
cuda::ElementType element_type(nvinfer1::DataType type);

// A size as the kernels take it; 0 for one that is not known. `what` names it in the sentence when
// it is too large.
int32_t narrow(const char* what, int64_t size);

// The types that hidden_states may have: any float type, or the one that weight_format names.
bool allows_hidden_states(const Attributes& attributes, nvinfer1::DataType type);

void check_input_types(const Attributes& attributes, const Inputs& inputs,
                       const nvinfer1::DataType* types);

// Checks what is known of the shapes (-1: a size not known yet) and returns the sizes that follow.
cpu::Sizes check_input_shapes(const Attributes& attributes, const Inputs& inputs,
                              const std::vector<std::vector<int64_t>>& shapes);

// The shape for the kernels. Only tokens, policies and choices may be unknown; they become 0.
cuda::MoeShape make_shape(const Attributes& attributes, const Inputs& inputs,
                          const std::vector<std::vector<int64_t>>& shapes,
                          nvinfer1::DataType hidden_states);

}  // namespace adaptive_k::tensorrt
