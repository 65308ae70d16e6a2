// SPDX-License-Identifier: Apache-2.0
// What the kernels of decode share: how a block's warps divide weight rows among themselves, and
// what they do with their sums.
#pragma once

#include "cuda/device.h"
#include "cuda/moe/activate.h"
#include "cuda/moe/decode.h"
#include "cuda/numeric.h"

namespace adaptive_k::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * 32;

// Neurons of a team of warps with so many weight rows: of a gated expert half are gates.
constexpr int neurons_of_team(bool gated, int weight_rows) {
  return gated ? weight_rows / 2 : weight_rows;
}

// Adds up the warps of each team, which have left the sums of `count` activation rows in `partial`,
// in rising order, and writes the block's neurons of planned rows from `row` on. Arguments has
// split, gated, neurons, activation and out.
template <typename T, bool kUp, typename Arguments, int kTokenRows, int kWeightRows>
__device__ __forceinline__ void write_neurons(
    const Arguments& a, const float (&partial)[kDecodeWarps][kTokenRows][kWeightRows], int row,
    int count) {
  const int per_team = neurons_of_team(a.gated, kWeightRows);
  const int outputs = kDecodeWarps / a.split * per_team;
  for (int i = threadIdx.x; i < count * outputs; i += kDecodeThreads) {
    const int m = i / outputs, team = i % outputs / per_team, j = i % per_team;
    const int neuron = static_cast<int>(blockIdx.x) * outputs + team * per_team + j;
    if (neuron >= a.neurons) continue;
    float value = 0, gate = 0;
    for (int p = 0; p < a.split; ++p) {
      const float* const sums = partial[team * a.split + p][m];
      gate += sums[j];
      value += sums[a.gated ? j + kWeightRows / 2 : j];
    }
    const int64_t to = static_cast<int64_t>(row + m) * a.neurons + neuron;
    if constexpr (kUp) {
      if (fault(kFaultUpActivation)) {
        const float other = gate;
        gate = value;
        value = other;
      }
      static_cast<T*>(a.out)[to] = from_float<T>(activate(a.activation, gate, value));
    } else {
      static_cast<float*>(a.out)[to] = value;
    }
  }
}

// Sets a->split and returns the grid: a block for each expert that there may be, by neurons. The
// number of active experts is not known here, so one alone should fill the machine: four blocks for
// each multiprocessor, as long as has_enough(split) says that every warp keeps work.
template <typename Arguments, typename HasEnough>
dim3 divide_rows(Arguments* a, int weight_rows, const HasEnough& has_enough) {
  const auto blocks = [&](int split) {
    const int64_t teams = kDecodeWarps / split;
    return divide_up(a->neurons, teams * neurons_of_team(a->gated, weight_rows));
  };
  a->split = 1;
  while (a->split < kDecodeWarps && blocks(a->split) < 4 * multiprocessors() &&
         has_enough(a->split))
    a->split *= 2;
  const int64_t experts =
      a->rows.max_rows < a->rows.num_experts ? a->rows.max_rows : a->rows.num_experts;
  return dim3(static_cast<unsigned>(blocks(a->split)), static_cast<unsigned>(experts));
}

}  // namespace adaptive_k::cuda
