// SPDX-License-Identifier: Apache-2.0
// Types and sizes as TensorRT has them, against an operator's table. Functions that find something
// wrong throw std::invalid_argument with a sentence.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <limits>
#include <string>

#include "cuda/interface.h"
#include "operator/table.h"
#include "operator/weight_format.h"
#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {

// The name of a type as the sentences have it.
inline const char* type_name(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
    case nvinfer1::DataType::kBF16:
      return "bfloat16";
    case nvinfer1::DataType::kINT8:
      return "int8";
    case nvinfer1::DataType::kINT32:
      return "int32";
    case nvinfer1::DataType::kINT64:
      return "int64";
    case nvinfer1::DataType::kBOOL:
      return "bool";
    default:
      return "another type";
  }
}

// The kernels' name for a float type.
inline cuda::ElementType element_type(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kHALF   ? cuda::ElementType::kFloat16
         : type == nvinfer1::DataType::kBF16 ? cuda::ElementType::kBFloat16
                                             : cuda::ElementType::kFloat32;
}

// A size as the kernels take it; 0 for one that is not known. `what` names it in the sentence when
// it is too large.
inline int32_t narrow(const char* what, int64_t size) {
  if (size > std::numeric_limits<int32_t>::max())
    fail(std::string("the ") + what + " " + std::to_string(size) + " does not fit in 32 bits");
  return static_cast<int32_t>(size < 0 ? 0 : size);
}

// The types that an operator's first input may have: any float type, or the one that weight_format
// names.
inline bool allows_element(WeightFormat format, nvinfer1::DataType type) {
  switch (format) {
    case WeightFormat::kFloat32:
      return type == nvinfer1::DataType::kFLOAT;
    case WeightFormat::kFloat16:
      return type == nvinfer1::DataType::kHALF;
    case WeightFormat::kBFloat16:
      return type == nvinfer1::DataType::kBF16;
    default:
      return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
             type == nvinfer1::DataType::kBF16;
  }
}

// The type that a tensor of the call (inputs first, then outputs) must have, given the first's.
template <typename Op>
nvinfer1::DataType expected_type(const typename Op::Params& params, const CallInputs<Op>& inputs,
                                 int32_t pos, nvinfer1::DataType first) {
  const Tensor& tensor =
      pos < inputs.count ? Op::kInputs[inputs.place[pos]] : Op::kOutputs[pos - inputs.count];
  switch (tensor.type) {
    case TypeRule::kElement:
      return first;
    case TypeRule::kFloat32:
      return nvinfer1::DataType::kFLOAT;
    case TypeRule::kInt32:
      return nvinfer1::DataType::kINT32;
    case TypeRule::kWeights:
      return is_quantised(Op::weight_format(params)) ? nvinfer1::DataType::kINT8 : first;
  }
  return first;
}

template <typename Op>
void check_types(const typename Op::Params& params, const CallInputs<Op>& inputs,
                 const nvinfer1::DataType* types) {
  const WeightFormat format = Op::weight_format(params);
  const std::string first = Op::kInputs[0].name;
  if (!allows_element(format, types[0])) {
    const bool any = is_quantised(format) || format == WeightFormat::kAsHiddenStates;
    fail("input " + first + " has type " + type_name(types[0]) + " but must be " +
         (any ? "float16, bfloat16 or float32"
              : std::string(spelling(format)) + ", by weight_format"));
  }
  for (int32_t i = 0; i < inputs.count; ++i) {
    const nvinfer1::DataType expected = expected_type<Op>(params, inputs, i, types[0]);
    if (types[i] == expected) continue;
    const TypeRule rule = Op::kInputs[inputs.place[i]].type;
    const bool follows =
        rule == TypeRule::kElement || (rule == TypeRule::kWeights && !is_quantised(format));
    fail(std::string("input ") + input_name<Op>(params, inputs.place[i]) + " has type " +
         type_name(types[i]) + " but must be " + type_name(expected) +
         (follows ? ", as " + first : ""));
  }
}

}  // namespace adaptive_k::tensorrt
