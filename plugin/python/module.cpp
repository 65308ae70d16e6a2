// SPDX-License-Identifier: Apache-2.0
#include "operator/mamba/description.h"
#include "operator/moe/description.h"
#include "python/bindings.h"

namespace adaptive_k::python {
namespace {

nb::list words(const WordList& list) {
  nb::list out;
  for (int32_t i = 0; i < list.count; ++i) out.append(list.words[i].word);
  return out;
}

// The table of an operator, as plugin/description.py reads it.
template <typename Op>
nb::dict table() {
  constexpr const char* kTypes[] = {"integer", "flag", "real", "word"};
  constexpr const char* kRules[] = {"element", "float32", "int32", "weights"};
  constexpr const char* kPresence[] = {"always", "given", "quantised", "has_expert_norms"};
  const typename Op::Params defaults;
  nb::list attributes;
  for (const auto& a : Op::kAttributes) {
    nb::object value;
    if (a.type == AttributeType::kWord)
      value = nb::cast(word_of(a, defaults));
    else if (a.type == AttributeType::kReal)
      value = nb::cast(a.get(defaults));
    else
      value = nb::cast(static_cast<int64_t>(a.get(defaults)));
    attributes.append(
        nb::make_tuple(a.name, kTypes[static_cast<int32_t>(a.type)], value, words(a.words)));
  }
  const auto tensors = [&](const auto& list) {
    nb::list out;
    for (const Tensor& t : list)
      out.append(nb::make_tuple(
          t.name, kRules[static_cast<int32_t>(t.type)], kPresence[static_cast<int32_t>(t.presence)],
          t.shape, t.gated_name ? t.gated_name : t.name, t.gated_shape ? t.gated_shape : t.shape));
    return out;
  };
  nb::dict out;
  out["name"] = Op::kName;
  out["attributes"] = attributes;
  out["inputs"] = tensors(Op::kInputs);
  out["outputs"] = tensors(Op::kOutputs);
  return out;
}

nb::dict description() {
  nb::list formats;
  for (const Word& w : kWeightFormatWords) {
    const auto format = static_cast<WeightFormat>(w.value);
    if (*w.word)
      formats.append(
          nb::make_tuple(w.word, bits_of(format), is_quantised(format), row_multiple(format)));
  }
  nb::list gated;
  for (const Word& w : kActivationWords)
    if (is_gated(static_cast<Activation>(w.value))) gated.append(w.word);
  nb::dict kinds;
  for (const Word& w : kPolicyKindWords) kinds[w.word] = w.value;
  nb::dict out;
  out["moe"] = table<Moe>();
  out["mamba"] = table<Mamba>();
  out["policy_kinds"] = kinds;
  out["weight_formats"] = formats;
  out["gated_activations"] = gated;
  out["max_k"] = kMaxK;
  out["max_experts_on_gpu"] = kMaxExpertsOnGpu;
  out["max_state_size_on_gpu"] = kMaxStateSizeOnGpu;
  return out;
}

}  // namespace
}  // namespace adaptive_k::python

NB_MODULE(_plugin, m) {
  m.doc() = "The operators on a CPU. Use them through the package, which checks types.";
  m.def("description", &adaptive_k::python::description);
  adaptive_k::python::bind_moe(m);
  adaptive_k::python::bind_mamba(m);
}
