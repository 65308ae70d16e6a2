// SPDX-License-Identifier: Apache-2.0
// Shapes of inputs, and the check of them against an operator's table.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "operator/table.h"

namespace adaptive_k {

// One input's shape; -1 is a dimension not yet known, no value is a shape of unknown rank, or an
// input that is not there.
using Shape = std::optional<std::vector<int64_t>>;

template <typename Op>
using Shapes = std::array<Shape, kNumInputs<Op>>;

// A shape as the sentences have it, e.g. "[?, 64]".
std::string shape_text(const std::vector<int64_t>& shape);

// Learns the value of each symbol from the first input that has it and holds the others to it.
class Binder {
 public:
  // Throws std::invalid_argument with a sentence that names the input.
  void bind(const std::string& name, const Shape& shape, const std::string& pattern);

  // -1 while it is not known.
  int64_t value(const std::string& symbol) const;

 private:
  struct Known {
    int64_t value;
    std::string input;
  };
  std::map<std::string, Known> values_;
};

// The symbols of all inputs but the scales, whose groups have a check of their own. Inputs that
// have a symbol less one come last, so that others say what it is.
template <typename Op>
Binder bind_shapes(const typename Op::Params& params, const Shapes<Op>& shapes) {
  Binder binder;
  for (const bool less_one : {false, true}) {
    for (int32_t i = 0; i < kNumInputs<Op>; ++i) {
      const std::string pattern = input_shape<Op>(params, i);
      if (pattern.find('/') != std::string::npos) continue;
      if ((pattern.find('-') != std::string::npos) != less_one) continue;
      binder.bind(input_name<Op>(params, i), shapes[i], pattern);
    }
  }
  return binder;
}

// A weight's shape in values, given that of a tensor in which a value may be several elements or a
// part of one.
Shape in_values(Shape shape, int64_t element_bits, int64_t value_bits);

}  // namespace adaptive_k
