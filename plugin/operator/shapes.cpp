// SPDX-License-Identifier: Apache-2.0
#include "operator/shapes.h"

#include <cctype>
#include <cstdlib>
#include <stdexcept>

namespace adaptive_k {
namespace {

// A dimension that must be factor * symbol + offset.
struct Dimension {
  int64_t factor;
  std::string symbol;
  int64_t offset;
};

std::vector<Dimension> parse(const std::string& pattern) {
  std::vector<Dimension> dimensions;
  for (const char* at = pattern.c_str(); *at != '\0';) {
    Dimension d{1, "", 0};
    char* end = nullptr;
    if (std::isdigit(*at)) {
      d.factor = std::strtol(at, &end, 10);
      at = end;
    }
    while (std::isalpha(*at)) d.symbol += *at++;
    if (*at == '+' || *at == '-') {
      d.offset = std::strtol(at, &end, 10);
      at = end;
    }
    while (*at == ',' || *at == ' ') ++at;
    dimensions.push_back(d);
  }
  return dimensions;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    out += (i ? ", " : "") + (shape[i] < 0 ? std::string("?") : std::to_string(shape[i]));
  return out + "]";
}

void Binder::bind(const std::string& name, const Shape& shape, const std::string& pattern) {
  if (!shape) return;
  const std::string must =
      "input " + name + " has shape " + shape_text(*shape) + " but must be [" + pattern + "]";
  const auto fail = [&](const std::string& why = "") { throw std::invalid_argument(must + why); };
  const std::vector<Dimension> expected = parse(pattern);
  if (shape->size() != expected.size()) fail();
  size_t axis = 0;
  for (const Dimension& d : expected) {
    const int64_t size = (*shape)[axis++];
    if (size < 0) continue;
    const auto known = values_.find(d.symbol);
    if (known != values_.end()) {
      if (size != known->second.value * d.factor + d.offset)
        fail(", where " + d.symbol + " = " + std::to_string(known->second.value) + " by input " +
             known->second.input);
    } else if (size < d.offset) {
      fail();
    } else if ((size - d.offset) % d.factor != 0) {
      fail(", so dimension " + std::to_string(axis - 1) + " must be even");
    } else {
      values_[d.symbol] = {(size - d.offset) / d.factor, name};
    }
  }
}

int64_t Binder::value(const std::string& symbol) const {
  const auto known = values_.find(symbol);
  return known == values_.end() ? -1 : known->second.value;
}

Shape in_values(Shape shape, int64_t element_bits, int64_t value_bits) {
  if (shape && !shape->empty() && shape->back() > 0)
    shape->back() = shape->back() * element_bits / value_bits;
  return shape;
}

}  // namespace adaptive_k
