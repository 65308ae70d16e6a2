// SPDX-License-Identifier: Apache-2.0
// What bindings do with an operator's tables: read and spell attributes, find out which inputs a
// call has, name them. Op is one of the descriptions (Moe, Mamba). All functions that find
// something wrong throw std::invalid_argument with a sentence, in which the caller names the
// operator.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "operator/description.h"

namespace adaptive_k {

template <typename Op>
constexpr int32_t kNumAttributes =
    static_cast<int32_t>(sizeof(Op::kAttributes) / sizeof(Op::kAttributes[0]));
template <typename Op>
constexpr int32_t kNumInputs = static_cast<int32_t>(sizeof(Op::kInputs) / sizeof(Op::kInputs[0]));
template <typename Op>
constexpr int32_t kNumOutputs =
    static_cast<int32_t>(sizeof(Op::kOutputs) / sizeof(Op::kOutputs[0]));

// "a, b, c", without the empty word.
inline std::string choices(const WordList& list) {
  std::string out;
  for (int32_t i = 0; i < list.count; ++i)
    if (*list.words[i].word) out += (out.empty() ? "" : ", ") + std::string(list.words[i].word);
  return out;
}

inline const char* spelling(const WordList& list, int32_t value) {
  for (int32_t i = 0; i < list.count; ++i)
    if (list.words[i].value == value) return list.words[i].word;
  return "?";
}
template <typename Enum>
const char* spelling(Enum value) {
  return spelling(words_of(value), static_cast<int32_t>(value));
}

template <typename Params>
const char* word_of(const Attribute<Params>& a, const Params& params) {
  return spelling(a.words, static_cast<int32_t>(a.get(params)));
}

// kind is what the caller's world calls an attribute ("attribute", "field").
template <typename Params>
void set_word(const Attribute<Params>& a, const char* kind, const std::string& word,
              Params* params) {
  for (int32_t i = 0; i < a.words.count; ++i)
    if (a.words.words[i].word == word) return a.set(params, a.words.words[i].value);
  throw std::invalid_argument(std::string(kind) + " " + a.name + " is '" + word +
                              "' but must be one of " + choices(a.words));
}

template <typename Params>
void set_integer(const Attribute<Params>& a, const char* kind, int64_t value, Params* params) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(kind) + " " + a.name + " is " + std::to_string(value) +
                                ", which does not fit in 32 bits");
  a.set(params, static_cast<double>(value));
}

// Runs body, whose sentences then begin with the operator's name.
template <typename Op, typename Body>
auto named(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(Op::kName) + ": " + error.what());
  }
}

// One line of name=value pairs that holds exactly what tells two layers apart.
template <typename Op>
std::string describe(const typename Op::Params& params) {
  std::ostringstream text;
  text.precision(std::numeric_limits<float>::max_digits10);
  for (const auto& a : Op::kAttributes) {
    if (&a != Op::kAttributes) text << ' ';
    text << a.name << '=';
    if (a.type == AttributeType::kWord)
      text << word_of(a, params);
    else if (a.type == AttributeType::kReal)
      text << static_cast<float>(a.get(params));
    else
      text << static_cast<int64_t>(a.get(params));
  }
  return text.str();
}

template <typename Op>
const char* input_name(const typename Op::Params& params, int32_t place) {
  const Tensor& t = Op::kInputs[place];
  return t.gated_name != nullptr && Op::gated(params) ? t.gated_name : t.name;
}

// The symbols of an input's shape. Weights of a part of the experts are of W of them, not of E.
template <typename Op>
std::string input_shape(const typename Op::Params& params, int32_t place) {
  const Tensor& t = Op::kInputs[place];
  std::string shape = t.gated_shape != nullptr && Op::gated(params) ? t.gated_shape : t.shape;
  if (t.type == TypeRule::kWeights && Op::partial(params)) shape[0] = 'W';
  return shape;
}

// The inputs of one call: for each of the table its index in the call, or -1.
template <typename Op>
struct CallInputs {
  int32_t count = 0;
  std::array<int32_t, kNumInputs<Op>> index;
  std::array<int32_t, kNumInputs<Op>> place;  // the other way round: of the first `count` indices
};

template <typename Op>
CallInputs<Op> find_inputs(const typename Op::Params& params, int64_t count) {
  int32_t needed = 0, optional = -1;
  for (int32_t i = 0; i < kNumInputs<Op>; ++i) {
    if (Op::kInputs[i].presence == Presence::kIfGiven) optional = i;
    needed += Op::present(params, Op::kInputs[i].presence);
  }
  if (count != needed && (optional < 0 || count != needed + 1)) {
    std::string sentence =
        "has " + std::to_string(count) + " inputs but takes " + std::to_string(needed);
    if (optional >= 0)
      sentence += ", or " + std::to_string(needed + 1) + " with " + Op::kInputs[optional].name;
    throw std::invalid_argument(sentence + Op::why_so_many(params));
  }
  CallInputs<Op> found;
  for (int32_t i = 0; i < kNumInputs<Op>; ++i) {
    const bool there =
        i == optional ? count > needed : Op::present(params, Op::kInputs[i].presence);
    found.index[i] = there ? found.count : -1;
    if (there) found.place[found.count++] = i;
  }
  return found;
}

}  // namespace adaptive_k
