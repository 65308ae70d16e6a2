// SPDX-License-Identifier: Apache-2.0
#include "tensorrt/fields.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <sstream>

#include "tensorrt/guard.h"

namespace adaptive_k::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr AttributeWord kWeightWords[] = {
    {"float32", static_cast<int32_t>(WeightFields::kFloat32)},
    {"float16", static_cast<int32_t>(WeightFields::kFloat16)},
    {"bfloat16", static_cast<int32_t>(WeightFields::kBFloat16)},
    {"int8", static_cast<int32_t>(WeightFields::kInt8)},
    {"int4", static_cast<int32_t>(WeightFields::kInt4)},
    {"", static_cast<int32_t>(WeightFields::kAsHiddenStates)},
};
constexpr const char* kWeightChoices = "float32, float16, bfloat16, int8, int4";

template <size_t N>
const char* spelling(const AttributeWord (&words)[N], int32_t value) {
  for (const AttributeWord& entry : words)
    if (entry.value == value) return entry.word;
  return "?";
}

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

// TensorRT's ONNX parser counts the closing NUL in the length; others give the bare characters.
std::string read_word(const PluginField& field) {
  if (field.type != PluginFieldType::kCHAR || field.length < 0) fail_type(field, "CHAR text");
  const char* text = static_cast<const char*>(field.data);
  return std::string(text, strnlen(text, static_cast<size_t>(field.length)));
}

template <typename Enum, size_t N>
Enum read_choice(const PluginField& field, const AttributeWord (&words)[N], const char* choices) {
  const std::string given = read_word(field);
  Enum value{};
  if (!parse_word(words, given.c_str(), &value))
    fail(std::string("field ") + field.name + " is '" + given + "' but must be one of " + choices);
  return value;
}

// Fields may lie at any address, so values are copied out.
template <typename T>
T value_of(const PluginField& field) {
  T value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

void read_field(const PluginField& field, Attributes* a) {
  const std::string name = field.name;
  if (name == "activation") {
    a->params.activation = read_choice<Activation>(field, kActivationWords, kActivationChoices);
  } else if (name == "scoring") {
    a->params.scoring = read_choice<Scoring>(field, kScoringWords, kScoringChoices);
  } else if (name == "weight_format") {
    a->weights = read_choice<WeightFields>(field, kWeightWords, kWeightChoices);
  } else if (name == "norm_topk_prob") {
    a->params.norm_topk_prob = read_int(field) != 0;
  } else if (name == "routed_scaling_factor") {
    a->params.routed_scaling_factor = read_float(field);
    if (!std::isfinite(a->params.routed_scaling_factor))
      fail("field routed_scaling_factor is not a finite number");
  } else if (name == "n_group") {
    a->params.n_group = read_int(field);
  } else if (name == "topk_group") {
    a->params.topk_group = read_int(field);
  } else if (name == "max_k") {
    a->params.max_k = read_int(field);
  } else if (name == "has_expert_norms") {
    a->has_expert_norms = read_int(field) != 0;
  } else {
    fail_unknown(field, *field_names());
  }
}

}  // namespace

int32_t read_int(const PluginField& field) {
  if (field.length == 1 && field.type == PluginFieldType::kINT32) return value_of<int32_t>(field);
  if (field.length != 1 || field.type != PluginFieldType::kINT64)
    fail_type(field, "one INT32 or INT64");
  const int64_t value = value_of<int64_t>(field);
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    fail(std::string("field ") + field.name + " is " + std::to_string(value) +
         ", which does not fit in 32 bits");
  return static_cast<int32_t>(value);
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

const char* word(WeightFields weights) {
  return spelling(kWeightWords, static_cast<int32_t>(weights));
}

std::string describe(const Attributes& a) {
  std::ostringstream text;
  text.precision(std::numeric_limits<float>::max_digits10);
  text << "activation=" << spelling(kActivationWords, static_cast<int32_t>(a.params.activation))
       << " scoring=" << spelling(kScoringWords, static_cast<int32_t>(a.params.scoring))
       << " norm_topk_prob=" << (a.params.norm_topk_prob ? 1 : 0)
       << " routed_scaling_factor=" << a.params.routed_scaling_factor
       << " n_group=" << a.params.n_group << " topk_group=" << a.params.topk_group
       << " max_k=" << a.params.max_k << " weight_format=" << word(a.weights)
       << " has_expert_norms=" << (a.has_expert_norms ? 1 : 0);
  return text.str();
}

Attributes read_fields(const PluginFieldCollection* collection) {
  Attributes attributes;
  for_each_field(collection, [&](const PluginField& field) { read_field(field, &attributes); });
  if (const char* wrong = check_attributes(attributes.params, /*num_experts=*/0))
    fail(std::string("field ") + wrong + " (" + describe(attributes) + ")");
  return attributes;
}

const PluginFieldCollection* field_names() {
  static const PluginField kFields[] = {
      {"activation", nullptr, PluginFieldType::kCHAR, 1},
      {"scoring", nullptr, PluginFieldType::kCHAR, 1},
      {"norm_topk_prob", nullptr, PluginFieldType::kINT32, 1},
      {"routed_scaling_factor", nullptr, PluginFieldType::kFLOAT32, 1},
      {"n_group", nullptr, PluginFieldType::kINT32, 1},
      {"topk_group", nullptr, PluginFieldType::kINT32, 1},
      {"max_k", nullptr, PluginFieldType::kINT32, 1},
      {"weight_format", nullptr, PluginFieldType::kCHAR, 1},
      {"has_expert_norms", nullptr, PluginFieldType::kINT32, 1},
  };
  static const PluginFieldCollection kCollection{
      static_cast<int32_t>(sizeof(kFields) / sizeof(kFields[0])), kFields};
  return &kCollection;
}

FieldList::FieldList(const Attributes& a)
    : activation_(spelling(kActivationWords, static_cast<int32_t>(a.params.activation))),
      scoring_(spelling(kScoringWords, static_cast<int32_t>(a.params.scoring))),
      weight_format_(word(a.weights)),
      norm_topk_prob_(a.params.norm_topk_prob ? 1 : 0),
      n_group_(a.params.n_group),
      topk_group_(a.params.topk_group),
      max_k_(a.params.max_k),
      has_expert_norms_(a.has_expert_norms ? 1 : 0),
      routed_scaling_factor_(a.params.routed_scaling_factor) {
  const auto text = [this](const char* name, const std::string& value) {
    // With the closing NUL, as the ONNX parser gives them.
    fields_.emplace_back(name, value.c_str(), PluginFieldType::kCHAR,
                         static_cast<int32_t>(value.size()) + 1);
  };
  const auto number = [this](const char* name, const int32_t& value) {
    fields_.emplace_back(name, &value, PluginFieldType::kINT32, 1);
  };
  text("activation", activation_);
  text("scoring", scoring_);
  number("norm_topk_prob", norm_topk_prob_);
  fields_.emplace_back("routed_scaling_factor", &routed_scaling_factor_, PluginFieldType::kFLOAT32,
                       1);
  number("n_group", n_group_);
  number("topk_group", topk_group_);
  number("max_k", max_k_);
  text("weight_format", weight_format_);
  number("has_expert_norms", has_expert_norms_);
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

}  // namespace adaptive_k::tensorrt
