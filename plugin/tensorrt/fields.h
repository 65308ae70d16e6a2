// SPDX-License-Identifier: Apache-2.0
// The operator's attributes as TensorRT's plugin fields: read from an ONNX node or a serialized
// engine, and written into one. Names and words are those of the ONNX attributes.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "operator/moe/params.h"

namespace adaptive_k::tensorrt {

// Values of fields, and what is wrong with them; for both plugins. All throw std::invalid_argument
// with a sentence.
int32_t read_int(const nvinfer1::PluginField& field);
float read_float(const nvinfer1::PluginField& field);
[[noreturn]] void fail_unknown(const nvinfer1::PluginField& field,
                               const nvinfer1::PluginFieldCollection& names);
// Calls read with each field; refuses collections that are none, and fields given twice or without
// a name or data.
void for_each_field(const nvinfer1::PluginFieldCollection* collection,
                    const std::function<void(const nvinfer1::PluginField&)>& read);

// How the expert weights arrive. The plain formats say only that the weights have that type, which
// must be that of hidden_states; kAsHiddenStates leaves it unsaid.
enum class WeightFields : int32_t { kAsHiddenStates, kFloat32, kFloat16, kBFloat16, kInt8, kInt4 };

struct Attributes {
  MoeParams params;  // its weight_format is the CPU's and not used here
  WeightFields weights = WeightFields::kAsHiddenStates;
  bool has_expert_norms = false;  // whether the last input is expert_norms
};

inline bool is_quantised(WeightFields weights) {
  return weights == WeightFields::kInt8 || weights == WeightFields::kInt4;
}

// The spelling of a weight format; "" for kAsHiddenStates.
const char* word(WeightFields weights);

// One line of name=value pairs that holds exactly what distinguishes two plugins.
std::string describe(const Attributes& attributes);

// Absent fields keep their defaults. Throws std::invalid_argument with a sentence when a field is
// unknown, given twice, of a wrong type or length, or out of range.
Attributes read_fields(const nvinfer1::PluginFieldCollection* collection);

// The names and types that a creator announces, with no data. Lives as long as the library.
const nvinfer1::PluginFieldCollection* field_names();

// Attributes as fields that read_fields() takes back. Owns what the fields point to.
class FieldList {
 public:
  explicit FieldList(const Attributes& attributes);
  FieldList(const FieldList&) = delete;
  FieldList& operator=(const FieldList&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::string activation_, scoring_, weight_format_;
  int32_t norm_topk_prob_, n_group_, topk_group_, max_k_, has_expert_norms_;
  float routed_scaling_factor_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace adaptive_k::tensorrt
