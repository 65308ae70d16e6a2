// SPDX-License-Identifier: Apache-2.0
// What the operators share that multiply tokens with weights: how rows of weights and of packed
// activations are named, and how the work is divided into tasks.
#pragma once

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <vector>

#include "cpu/machine.h"
#include "cpu/moe/kernels/kernels.h"
#include "cpu/moe/plan.h"
#include "cpu/scratch.h"

namespace adaptive_k::cpu {

// Weight bytes that are worth a task of their own.
constexpr int64_t kTaskBytes = 64 << 10;
// The most panels that a task takes: activations come into the second-level cache once for all.
constexpr int64_t kMaxPanels = 8;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Calls body(i) for i in [0, n), `grain` calls to a task.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, bool serial, const Body& body) {
  if (serial || n <= grain) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  tbb::parallel_for(
      tbb::blocked_range<int64_t>(0, n, grain),
      [&](const tbb::blocked_range<int64_t>& range) {
        for (int64_t i = range.begin(); i < range.end(); ++i) body(i);
      },
      tbb::simple_partitioner());
}

// A layer's weight: for each expert `rows` rows of K values.
struct Matrix {
  WeightFormat format;
  const void* values;
  const float* scales;  // null unless quantised
  int64_t rows, K;
  int64_t group_size;

  Matrix(WeightFormat format, const void* values, const float* scales, int64_t rows, int64_t K,
         int64_t group_size)
      : format(format),
        values(values),
        scales(scales),
        rows(rows),
        K(K),
        group_size(group_size == 0 ? K : group_size) {}

  int64_t row_bytes() const { return K * bits_of(format) / 8; }
};

// The weight rows of an expert that a task multiplies with. Missing rows repeat the last, so that
// the kernels need no edge case.
class WeightRows {
 public:
  WeightRows(const Matrix& matrix, int64_t expert)
      : matrix_(matrix), first_row_(expert * matrix.rows), row_bytes_(matrix.row_bytes()) {}

  void add(int64_t first, int64_t count, int64_t end) {
    for (int64_t r = 0; r < count; ++r, ++size_) {
      const int64_t row = first_row_ + std::min(first + r, end - 1);
      rows_[size_] = static_cast<const char*>(matrix_.values) + row * row_bytes_;
      if (matrix_.scales != nullptr)
        scales_[size_] = matrix_.scales + row * (matrix_.K / matrix_.group_size);
    }
  }
  // What is likely to be multiplied next by the same thread: groups of kGroupRows.
  void then(int64_t expert, int64_t first) {
    const int64_t row = expert * matrix_.rows + first;
    if (num_next_ < kNextGroups && first < matrix_.rows)
      next_[num_next_++] = static_cast<const char*>(matrix_.values) + row * row_bytes_;
  }
  int size() const { return size_; }
  Weights weights() const {
    Weights weights = {
        matrix_.format,     size_, rows_, matrix_.scales == nullptr ? nullptr : scales_,
        matrix_.group_size, {}};
    std::copy_n(next_, num_next_, weights.next);
    return weights;
  }
  int64_t K() const { return matrix_.K; }

 private:
  const Matrix& matrix_;
  int64_t first_row_, row_bytes_;
  const void* rows_[kMaxPanels * kPanelRows];
  const float* scales_[kMaxPanels * kPanelRows];
  int size_ = 0;
  const void* next_[kNextGroups];
  int num_next_ = 0;
};

// How many of `units` pieces of work of unit_bytes a task takes, so that tasks are worth their cost
// and there are enough of them to keep all threads busy to the end.
inline int64_t units_per_task(int64_t units, int64_t unit_bytes, int64_t at_most) {
  const int64_t threads = tbb::this_task_arena::max_concurrency();
  const int64_t worth = divide_up(kTaskBytes, unit_bytes);
  return std::clamp<int64_t>(std::max(units / (8 * threads), worth), 1, at_most);
}

// Token rows that are multiplied together: as many as let a part of their activations fill half the
// second-level cache.
inline int block_rows(const Kernels& kernels) {
  const int64_t fit = second_level_cache_bytes() / 2 / (int64_t{kPart} * kernels.activation_bytes);
  return static_cast<int>(std::clamp<int64_t>(fit, 24, kernels.max_block_rows));
}

// Bytes of a row of activations that is packed for the matrix.
inline int64_t packed_row_bytes(const Kernels& kernels, const Matrix& matrix) {
  if (kernels.rounds_to_int8) return ActivationBlocks(matrix.K, matrix.group_size).row_bytes();
  return round_up(matrix.K, kernels.lanes) * kernels.activation_bytes;
}

// Whether a lone row is used where it lies.
inline bool needs_no_packing(const Kernels& kernels, const Matrix& matrix, int rows) {
  return rows == 1 && !kernels.rounds_to_int8 && kernels.activation_bytes == sizeof(float) &&
         matrix.K % kernels.lanes == 0;
}

inline char* reserve_bytes(FloatBuffer& buffer, int64_t bytes) {
  return reinterpret_cast<char*>(
      buffer.reserve(divide_up(bytes, static_cast<int64_t>(sizeof(float)))));
}

// Packs num_rows rows for the matrix, tile by tile, where they need it; row(i) is the i-th.
template <typename Row>
void pack_rows(const Kernels& kernels, const Matrix& matrix,
               const std::vector<Plan::TileRange>& ranges, int64_t num_rows, bool serial,
               const Row& row, FloatBuffer& buffer, std::vector<Tile>* tiles) {
  const int64_t row_bytes = packed_row_bytes(kernels, matrix);
  bool all_in_place = true;
  for (const Plan::TileRange& range : ranges)
    all_in_place = all_in_place && needs_no_packing(kernels, matrix, range.rows);
  char* room = all_in_place ? nullptr : reserve_bytes(buffer, num_rows * row_bytes);
  tiles->resize(ranges.size());
  const int64_t grain = std::max<int64_t>(1, 8192 / matrix.K);
  parallel_for(ranges.size(), grain, serial || all_in_place, [&](int64_t i) {
    const Plan::TileRange& range = ranges[i];
    const float* rows[kMaxTileRows];
    for (int r = 0; r < range.rows; ++r) rows[r] = row(range.first_row + r);
    if (needs_no_packing(kernels, matrix, range.rows)) {
      (*tiles)[i] = {rows[0], 1};
      return;
    }
    char* to = room + range.first_row * row_bytes;
    kernels.pack(rows, range.rows, matrix.K, matrix.format, matrix.group_size, to);
    (*tiles)[i] = {to, range.rows};
  });
}

}  // namespace adaptive_k::cpu
