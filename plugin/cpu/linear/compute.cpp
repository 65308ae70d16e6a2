// SPDX-License-Identifier: Apache-2.0
#include "cpu/linear/compute.h"

#include <cstring>

#include "cpu/moe/products.h"

namespace adaptive_k::cpu {
namespace {

// Weight bytes below which a product stays on the calling thread.
constexpr int64_t kSerialBytes = 96 << 10;

}  // namespace

void linear(const LinearArguments& args, float* output) {
  const int64_t tokens = args.tokens, columns = args.out_features;
  if (tokens == 0 || columns == 0) return;
  const Kernels& kernels = cpu::kernels(args.weight_format, args.activation_format);
  const Matrix matrix(args.weight_format, args.weight, args.scales, columns, args.in_features,
                      args.group_size);

  // The tokens in blocks, and those in tiles, all as large as one another.
  const int64_t num_blocks = divide_up(tokens, block_rows(kernels));
  const auto block_begin = [&](int64_t b) { return b * tokens / num_blocks; };
  std::vector<int64_t> first_row, first_tile;  // of each tile; of each block
  for (int64_t b = 0; b < num_blocks; ++b) {
    first_tile.push_back(static_cast<int64_t>(first_row.size()));
    const int64_t rows = block_begin(b + 1) - block_begin(b);
    const int64_t tiles = divide_up(rows, kernels.tile_rows);
    for (int64_t t = 0; t < tiles; ++t) first_row.push_back(block_begin(b) + t * rows / tiles);
  }
  const auto num_tiles = static_cast<int64_t>(first_row.size());
  first_tile.push_back(num_tiles);
  first_row.push_back(tokens);

  const ScratchLease lease;
  Scratch& scratch = *lease;
  std::vector<Tile>& tiles = scratch.x_tiles;
  tiles.resize(num_tiles);
  const int64_t row_bytes = packed_row_bytes(kernels, matrix);
  auto* room = reinterpret_cast<char*>(
      scratch.x.reserve(divide_up(tokens * row_bytes, static_cast<int64_t>(sizeof(float)))));
  const bool serial =
      columns * matrix.row_bytes() * divide_up(tokens, kernels.tile_rows) < kSerialBytes;
  parallel_for(num_tiles, std::max<int64_t>(1, 8192 / matrix.K), serial, [&](int64_t t) {
    const int rows = static_cast<int>(first_row[t + 1] - first_row[t]);
    const float* from[kMaxTileRows];
    for (int r = 0; r < rows; ++r) from[r] = args.input + (first_row[t] + r) * matrix.K;
    if (needs_no_packing(kernels, matrix, rows)) {
      tiles[t] = {from[0], 1};
      return;
    }
    char* to = room + first_row[t] * row_bytes;
    kernels.pack(from, rows, matrix.K, matrix.format, matrix.group_size, to);
    tiles[t] = {to, rows};
  });

  // A task computes some panels of columns for one block.
  const int64_t panels = divide_up(columns, kPanelRows);
  const int64_t per_task =
      units_per_task(num_blocks * panels, kPanelRows * matrix.row_bytes(), kMaxPanels);
  const int64_t strips = divide_up(panels, per_task);
  parallel_for(num_blocks * strips, 1, serial, [&](int64_t i) {
    const int64_t block = i / strips, first = i % strips * per_task * kPanelRows;
    const int64_t count = std::min(per_task * kPanelRows, columns - first);
    const int64_t begin = block_begin(block), rows = block_begin(block + 1) - begin;
    WeightRows weights(matrix, 0);
    weights.add(first, round_up(count, kPanelRows), columns);
    float* c = thread_floats(rows * weights.size());
    kernels.multiply(tiles.data() + first_tile[block],
                     static_cast<int>(first_tile[block + 1] - first_tile[block]), weights.weights(),
                     matrix.K, second_level_cache_bytes(), c);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(output + (begin + r) * columns + first, c + r * weights.size(),
                  count * sizeof(float));
  });
}

}  // namespace adaptive_k::cpu
