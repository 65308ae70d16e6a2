// SPDX-License-Identifier: Apache-2.0
// How weights are stored.
#pragma once

#include <cstdint>

#include "operator/description.h"
#include "operator/host_device.h"

namespace adaptive_k {

// How a row of K weights is stored. int8 and int4 stand for value * scale, with one scale for each
// group of neighbours along the row, or for the whole row; two int4 share a byte, the one with the
// even index in the low half, both in two's complement. A target refuses what it cannot compute.
enum class WeightFormat : int32_t {
  kAsHiddenStates,  // numbers of the type that hidden_states has
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt8,
  kInt4,
};

constexpr Word kWeightFormatWords[] = {
    {"", static_cast<int32_t>(WeightFormat::kAsHiddenStates)},
    {"float32", static_cast<int32_t>(WeightFormat::kFloat32)},
    {"float16", static_cast<int32_t>(WeightFormat::kFloat16)},
    {"bfloat16", static_cast<int32_t>(WeightFormat::kBFloat16)},
    {"int8", static_cast<int32_t>(WeightFormat::kInt8)},
    {"int4", static_cast<int32_t>(WeightFormat::kInt4)},
};
constexpr WordList words_of(WeightFormat) { return kWeightFormatWords; }

// What products take of activations: the numbers as they are, or int8 with a scale for each block
// of neighbours, rounded as they are read. Integer weights alone are multiplied with integers.
enum class ActivationFormat : int32_t { kAsHiddenStates, kInt8 };

constexpr Word kActivationFormatWords[] = {
    {"", static_cast<int32_t>(ActivationFormat::kAsHiddenStates)},
    {"int8", static_cast<int32_t>(ActivationFormat::kInt8)},
};
constexpr WordList words_of(ActivationFormat) { return kActivationFormatWords; }

// A group of weights that share a scale is a whole row or a multiple of this many.
constexpr int32_t kGroupMultiple = 32;

// Bits of a value; 0 where hidden_states tells.
ADAPTIVE_K_HD constexpr int32_t bits_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kAsHiddenStates:
      return 0;
    case WeightFormat::kFloat32:
      return 32;
    case WeightFormat::kFloat16:
    case WeightFormat::kBFloat16:
      return 16;
    case WeightFormat::kInt8:
      return 8;
    case WeightFormat::kInt4:
      return 4;
  }
  return 0;
}

// Whether a value counts by its scale.
ADAPTIVE_K_HD constexpr bool is_quantised(WeightFormat format) {
  return bits_of(format) > 0 && bits_of(format) <= 8;
}

// What computes a format; the others refuse it by name.
constexpr bool on_cpus(WeightFormat format) { return format != WeightFormat::kFloat16; }
constexpr bool on_gpus(WeightFormat format) {
  return !is_quantised(format) || format == WeightFormat::kInt8 || format == WeightFormat::kInt4;
}

// Rows of quantised weights are a multiple of this long: 16 bytes of values.
ADAPTIVE_K_HD constexpr int32_t row_multiple(WeightFormat format) {
  return is_quantised(format) ? 128 / bits_of(format) : 1;
}

// The format that a layer's weights have, given that of its hidden states.
ADAPTIVE_K_HD constexpr WeightFormat stored_format(WeightFormat format,
                                                   WeightFormat hidden_states) {
  return format == WeightFormat::kAsHiddenStates ? hidden_states : format;
}

}  // namespace adaptive_k
