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

  const bool serial =
      columns * matrix.row_bytes() * divide_up(tokens, kernels.tile_rows) < kSerialBytes;
  const ScratchLease lease;
  Scratch& scratch = *lease;
  scratch.plan.build(tokens, kernels.tile_rows, block_rows(kernels));
  const std::vector<Plan::Block>& blocks = scratch.plan.blocks;
  std::vector<Tile>& tiles = scratch.x_tiles;
  pack_rows(
      kernels, matrix, scratch.plan.tiles, tokens, serial,
      [&](int64_t token) { return args.input + token * matrix.K; }, scratch.x, &tiles);

  // A task computes some panels of columns for one block.
  const int64_t panels = divide_up(columns, kPanelRows);
  const auto num_blocks = static_cast<int64_t>(blocks.size());
  const int64_t per_task =
      units_per_task(num_blocks * panels, kPanelRows * matrix.row_bytes(), kMaxPanels);
  const int64_t strips = divide_up(panels, per_task);
  parallel_for(num_blocks * strips, 1, serial, [&](int64_t i) {
    const Plan::Block& block = blocks[i / strips];
    const int64_t first = i % strips * per_task * kPanelRows;
    const int64_t count = std::min(per_task * kPanelRows, columns - first);
    WeightRows weights(matrix, 0);
    weights.add(first, round_up(count, kPanelRows), columns);
    for (int n = 0; n < kNextGroups; ++n)
      weights.then(0, first + per_task * kPanelRows + n * kGroupRows);
    float* c = thread_floats(block.num_rows * weights.size());
    kernels.multiply(tiles.data() + block.first_tile, block.num_tiles, weights.weights(), matrix.K,
                     second_level_cache_bytes(), c);
    for (int64_t r = 0; r < block.num_rows; ++r)
      std::memcpy(output + (block.first_row + r) * columns + first, c + r * weights.size(),
                  count * sizeof(float));
  });
}

}  // namespace adaptive_k::cpu
