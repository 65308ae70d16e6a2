// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/fields.h"

#include <cstring>
#include <set>

#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

const char* type_name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case PluginFieldType::kINT8:
      return "INT8";
    case PluginFieldType::kINT16:
      return "INT16";
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kCHAR:
      return "CHAR";
    case PluginFieldType::kDIMS:
      return "DIMS";
    case PluginFieldType::kBF16:
      return "BF16";
    case PluginFieldType::kINT64:
      return "INT64";
    default:
      return "an unknown type";
  }
}

[[noreturn]] void fail_type(const PluginField& field, const char* expected) {
  fail(std::string("field ") + field.name + " has type " + type_name(field.type) + " and length " +
       std::to_string(field.length) + " but must be " + expected);
}

// Fields may lie at any address, so values are copied out.
template <typename T>
T value_of(const PluginField& field) {
  T value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

}  // namespace

// TensorRT's ONNX parser counts the closing NUL in the length; others give the bare characters.
std::string read_word(const PluginField& field) {
  if (field.type != PluginFieldType::kCHAR || field.length < 0) fail_type(field, "CHAR text");
  const char* text = static_cast<const char*>(field.data);
  return std::string(text, strnlen(text, static_cast<size_t>(field.length)));
}

int64_t read_integer(const PluginField& field) {
  if (field.length == 1 && field.type == PluginFieldType::kINT32) return value_of<int32_t>(field);
  if (field.length != 1 || field.type != PluginFieldType::kINT64)
    fail_type(field, "one INT32 or INT64");
  return value_of<int64_t>(field);
}

float read_float(const PluginField& field) {
  if (field.length == 1 && field.type == PluginFieldType::kFLOAT32) return value_of<float>(field);
  if (field.length != 1 || field.type != PluginFieldType::kFLOAT64)
    fail_type(field, "one FLOAT32 or FLOAT64");
  return static_cast<float>(value_of<double>(field));
}

void fail_unknown(const PluginField& field, const PluginFieldCollection& names) {
  std::string known;
  for (int32_t i = 0; i < names.nbFields; ++i)
    known += (known.empty() ? "" : ", ") + std::string(names.fields[i].name);
  fail(std::string("field ") + field.name + " is not known; the fields are " + known);
}

void for_each_field(const PluginFieldCollection* collection,
                    const std::function<void(const PluginField&)>& read) {
  if (collection == nullptr) fail("the collection of fields is null");
  if (collection->nbFields < 0 || (collection->nbFields > 0 && collection->fields == nullptr))
    fail("the collection of fields says it has " + std::to_string(collection->nbFields) +
         " but carries none");
  std::set<std::string> seen;
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    if (field.name == nullptr) fail("field number " + std::to_string(i) + " has no name");
    if (!seen.insert(field.name).second)
      fail(std::string("field ") + field.name + " is given twice");
    if (field.data == nullptr) fail(std::string("field ") + field.name + " has no data");
    read(field);
  }
}

}  // namespace adaptive_k::tensorrt
