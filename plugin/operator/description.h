// SPDX-License-Identifier: Apache-2.0
// The words in which an operator is described, once: its attributes and its tensors, as tables that
// every binding (OpenVINO, TensorRT, CUDA's C interface, Python) loops over. moe/description.h and
// mamba/description.h are the two descriptions.
#pragma once

#include <cstdint>
#include <type_traits>

namespace adaptive_k {

// The spelling of a value of an enumeration.
struct Word {
  const char* word;
  int32_t value;
};

struct WordList {
  constexpr WordList() = default;
  template <int32_t kCount>
  constexpr WordList(const Word (&list)[kCount]) : words(list), count(kCount) {}

  const Word* words = nullptr;
  int32_t count = 0;
};

enum class AttributeType : int32_t { kInteger, kFlag, kReal, kWord };

// An attribute, and where it lies in the operator's Params, whose initialiser is its default. Every
// value fits in a double: integers of 32 bits, float32, 0 or 1, a word's number.
template <typename Params>
struct Attribute {
  const char* name;
  AttributeType type;
  WordList words;  // of a kWord
  double (*get)(const Params&);
  void (*set)(Params*, double);
};

template <typename Member>
struct MemberTraits;
template <typename P, typename V>
struct MemberTraits<V P::*> {
  using Params = P;
  using Value = V;
};

// The attribute that lies in a member of Params; its type follows from the member's.
template <auto member>
constexpr auto attribute(const char* name) {
  using Params = typename MemberTraits<decltype(member)>::Params;
  using Value = typename MemberTraits<decltype(member)>::Value;
  Attribute<Params> a{name, AttributeType::kInteger, {}, nullptr, nullptr};
  if constexpr (std::is_enum_v<Value>) {
    a.type = AttributeType::kWord;
    a.words = words_of(Value{});
  } else if constexpr (std::is_same_v<Value, bool>) {
    a.type = AttributeType::kFlag;
  } else if constexpr (std::is_floating_point_v<Value>) {
    a.type = AttributeType::kReal;
  }
  a.get = [](const Params& params) { return static_cast<double>(params.*member); };
  a.set = [](Params* params, double value) {
    if constexpr (std::is_enum_v<Value>)
      params->*member = static_cast<Value>(static_cast<int32_t>(value));
    else
      params->*member = static_cast<Value>(value);
  };
  return a;
}

// What decides whether an input is there. kIfGiven: the number of inputs tells.
enum class Presence : int32_t { kAlways, kIfGiven, kIfQuantised, kIfExpertNorms };

// What decides an input's or output's type. kElement: the type of the first input, which on CPUs is
// float32. kWeights: as weight_format says.
enum class TypeRule : int32_t { kElement, kFloat32, kInt32, kWeights };

// An input or output. A shape is a list of dimensions, each a symbol, a multiple of one ("2I") or
// one and a number ("C-1"); "H/group" is the number of groups that share a scale along a row.
struct Tensor {
  const char* name;
  const char* shape;
  TypeRule type = TypeRule::kElement;
  Presence presence = Presence::kAlways;
  const char* gated_name = nullptr;  // where a gated activation has other ones
  const char* gated_shape = nullptr;
};

// The addresses of an operator's inputs by their places in its table; null where one is absent.
template <typename Input>
struct Addresses {
  const void* at[static_cast<int32_t>(Input::kCount)] = {};

  const void* operator[](Input input) const { return at[static_cast<int32_t>(input)]; }
  const float* floats(Input input) const { return static_cast<const float*>((*this)[input]); }
  const int32_t* integers(Input input) const { return static_cast<const int32_t*>((*this)[input]); }
};

}  // namespace adaptive_k
