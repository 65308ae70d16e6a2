// SPDX-License-Identifier: Apache-2.0
// What both operators' bindings for Python share. The package's functions check the types of arrays
// by the operator's table and allocate the outputs.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "operator/shapes.h"
#include "operator/table.h"
#include "operator/weight_format.h"

namespace adaptive_k::python {

namespace nb = nanobind;

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using IntegersOut = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;

// By the places in the operator's table; None where one is absent.
using Inputs = std::vector<std::optional<Array>>;

template <typename Op>
typename Op::Params params_of(const nb::dict& attributes) {
  typename Op::Params params;
  for (const auto& a : Op::kAttributes) {
    if (!attributes.contains(a.name)) continue;
    const nb::object value = attributes[a.name];
    named<Op>([&] {
      if (a.type == AttributeType::kWord)
        set_word(a, "attribute", nb::cast<std::string>(value), &params);
      else if (a.type == AttributeType::kReal)
        a.set(&params, nb::cast<float>(value));
      else
        set_integer(a, "attribute", nb::cast<int64_t>(value), &params);
    });
  }
  return params;
}

template <typename Op>
Shapes<Op> shapes_of(const Inputs& inputs, WeightFormat format) {
  Shapes<Op> shapes;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (!inputs.at(i)) continue;
    std::vector<int64_t> shape;
    for (size_t axis = 0; axis < inputs[i]->ndim(); ++axis)
      shape.push_back(static_cast<int64_t>(inputs[i]->shape(axis)));
    shapes[i] = Op::kInputs[i].type == TypeRule::kWeights
                    ? in_values(shape, static_cast<int64_t>(inputs[i]->itemsize()) * 8,
                                bits_of(stored_format(format, WeightFormat::kFloat32)))
                    : shape;
  }
  return shapes;
}

template <typename Op>
Addresses<typename Op::Input> addresses_of(const Inputs& inputs) {
  Addresses<typename Op::Input> addresses;
  for (int32_t i = 0; i < kNumInputs<Op>; ++i)
    addresses.at[i] = inputs.at(i) ? inputs[i]->data() : nullptr;
  return addresses;
}

template <typename Op>
void require_room(bool fits) {
  if (!fits)
    throw std::invalid_argument(std::string(Op::kName) + ": an output array has the wrong size");
}

void bind_moe(nb::module_& m);
void bind_mamba(nb::module_& m);

}  // namespace adaptive_k::python
