// SPDX-License-Identifier: Apache-2.0
// An operator's attributes as TensorRT's plugin fields: read from an ONNX node or a serialized
// engine, and written into one. Names and words are those of the table.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "operator/table.h"

namespace adaptive_k::tensorrt {

// Values of fields, and what is wrong with them. All throw std::invalid_argument with a sentence.
std::string read_word(const nvinfer1::PluginField& field);
int64_t read_integer(const nvinfer1::PluginField& field);
float read_float(const nvinfer1::PluginField& field);
[[noreturn]] void fail_unknown(const nvinfer1::PluginField& field,
                               const nvinfer1::PluginFieldCollection& names);
// Calls read with each field; refuses collections that are none, and fields given twice or without
// a name or data.
void for_each_field(const nvinfer1::PluginFieldCollection* collection,
                    const std::function<void(const nvinfer1::PluginField&)>& read);

inline nvinfer1::PluginFieldType field_type(AttributeType type) {
  return type == AttributeType::kWord   ? nvinfer1::PluginFieldType::kCHAR
         : type == AttributeType::kReal ? nvinfer1::PluginFieldType::kFLOAT32
                                        : nvinfer1::PluginFieldType::kINT32;
}

// The names and types that a creator announces, with no data. Lives as long as the library.
template <typename Op>
const nvinfer1::PluginFieldCollection* field_names() {
  static const std::vector<nvinfer1::PluginField> fields = [] {
    std::vector<nvinfer1::PluginField> all;
    for (const auto& a : Op::kAttributes) all.emplace_back(a.name, nullptr, field_type(a.type), 1);
    return all;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                          fields.data()};
  return &collection;
}

// Absent fields keep their defaults. Throws std::invalid_argument with a sentence when a field is
// unknown, given twice, of a wrong type or length, or out of range.
template <typename Op>
typename Op::Params read_fields(const nvinfer1::PluginFieldCollection* collection) {
  typename Op::Params params;
  for_each_field(collection, [&](const nvinfer1::PluginField& field) {
    for (const auto& a : Op::kAttributes) {
      if (std::string(field.name) != a.name) continue;
      if (a.type == AttributeType::kWord) return set_word(a, "field", read_word(field), &params);
      if (a.type == AttributeType::kReal) return a.set(&params, read_float(field));
      return set_integer(a, "field", read_integer(field), &params);
    }
    fail_unknown(field, *field_names<Op>());
  });
  if (const char* wrong = Op::wrong_attributes(params))
    throw std::invalid_argument(std::string("field ") + wrong + " (" + describe<Op>(params) + ")");
  return params;
}

// Attributes as fields that read_fields() takes back. Owns what the fields point to.
template <typename Op>
class FieldList {
 public:
  explicit FieldList(const typename Op::Params& params) {
    for (const auto& a : Op::kAttributes) {
      const void* data;
      int32_t length = 1;
      if (a.type == AttributeType::kWord) {
        // With the closing NUL, as the ONNX parser gives them.
        const char* word = word_of(a, params);
        data = word;
        length = static_cast<int32_t>(std::string(word).size()) + 1;
      } else if (a.type == AttributeType::kReal) {
        data = &floats_.emplace_back(static_cast<float>(a.get(params)));
      } else {
        data = &integers_.emplace_back(static_cast<int32_t>(a.get(params)));
      }
      fields_.emplace_back(a.name, data, field_type(a.type), length);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  FieldList(const FieldList&) = delete;
  FieldList& operator=(const FieldList&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::deque<int32_t> integers_;  // whose elements stay where they are
  std::deque<float> floats_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace adaptive_k::tensorrt
