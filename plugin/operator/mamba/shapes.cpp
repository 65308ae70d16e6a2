// SPDX-License-Identifier: Apache-2.0
#include "operator/mamba/shapes.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace adaptive_k::cpu {
namespace {

[[noreturn]] void fail(const std::string& sentence) {
  throw std::invalid_argument("Mamba2: " + sentence);
}

}  // namespace

const char* mamba_input_name(int index) {
  constexpr const char* kNames[kMambaInputs] = {"conv_input", "dt",          "subsequence_begins",
                                                "past_lens",  "state_slots", "conv_weight",
                                                "conv_bias",  "A",           "D",
                                                "dt_bias",    "conv_state",  "ssm_state"};
  return kNames[index];
}

MambaSizes check_mamba_shapes(const MambaParams& params, const Shape (&shapes)[kMambaInputs]) {
  MambaSizes sizes;
  // A dimension that is `offset` more than a size; the first input that has it says what it is.
  struct Dimension {
    const char* name;
    int64_t* size;
    int64_t offset;
  };
  int64_t kept = -1;  // K - 1
  int64_t width = -1;
  const Dimension tokens{"T", &sizes.tokens, 0}, channels{"channels", &sizes.channels, 0},
      heads{"heads", &sizes.heads, 0}, sequences{"S", &sizes.sequences, 0},
      slots{"slots", &sizes.slots, 0}, states{"N", &sizes.state_size, 0},
      columns{"P", &sizes.head_dim, 0};
  const std::vector<Dimension> patterns[kMambaInputs] = {
      {tokens, channels},
      {tokens, heads},
      {{"S + 1", &sizes.sequences, 1}},
      {sequences},
      {sequences},
      {{"K", &kept, 1}, channels},
      {channels},
      {heads},
      {heads},
      {heads},
      {slots, {"K - 1", &kept, 0}, channels},
      {slots, heads, states, columns},
  };
  for (int i = 0; i < kMambaInputs; ++i) {
    if (!shapes[i]) continue;
    const std::vector<Dimension>& pattern = patterns[i];
    bool fits = shapes[i]->size() == pattern.size();
    for (size_t axis = 0; fits && axis < pattern.size(); ++axis) {
      const int64_t size = (*shapes[i])[axis] - pattern[axis].offset;
      if ((*shapes[i])[axis] < 0) continue;
      int64_t& known = *pattern[axis].size;
      if (known < 0) known = size;
      fits = size >= 0 && size == known;
    }
    if (fits) continue;
    std::string expected;
    for (const Dimension& d : pattern)
      expected += (expected.empty() ? "" : ", ") + std::string(d.name) +
                  (*d.size < 0 ? "" : " = " + std::to_string(*d.size + d.offset));
    fail("input " + std::string(mamba_input_name(i)) + " has shape " + shape_text(*shapes[i]) +
         " but must be [" + expected + "]");
  }
  sizes.taps = kept < 0 ? -1 : kept + 1;
  if (sizes.taps >= 0 && (sizes.taps < 2 || sizes.taps > kMaxTaps))
    fail("input conv_weight has " + std::to_string(sizes.taps) + " taps but must have 2 to " +
         std::to_string(kMaxTaps));
  if (params.n_groups < 1 || (sizes.heads >= 0 && sizes.heads % params.n_groups != 0))
    fail("attribute n_groups is " + std::to_string(params.n_groups) + " but must divide the heads" +
         (sizes.heads < 0 ? "" : ", which are " + std::to_string(sizes.heads)));
  if (!(params.dt_min >= 0) || !(params.dt_max >= params.dt_min))
    fail("attributes dt_min and dt_max are " + std::to_string(params.dt_min) + " and " +
         std::to_string(params.dt_max) + " but must rise from 0");
  if (sizes.heads == 0 || sizes.head_dim == 0 || sizes.state_size == 0)
    fail("input ssm_state has an empty dimension");
  if (sizes.heads > 0 && sizes.head_dim > 0 && sizes.state_size > 0 && sizes.channels >= 0) {
    width = sizes.heads * sizes.head_dim + 2 * params.n_groups * sizes.state_size;
    if (sizes.channels != width)
      fail("input conv_input has " + std::to_string(sizes.channels) +
           " channels but heads * P + 2 * n_groups * N is " + std::to_string(width));
  }
  return sizes;
}

}  // namespace adaptive_k::cpu
