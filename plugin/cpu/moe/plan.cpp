// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/plan.h"

#include <algorithm>

namespace adaptive_k::cpu {

void Plan::add_blocks(int32_t expert, int64_t first_row, int64_t rows, int tile_rows,
                      int block_rows) {
  const int64_t num_blocks = (rows + block_rows - 1) / block_rows;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = first_row + rows * b / num_blocks;
    const int64_t end = first_row + rows * (b + 1) / num_blocks;
    const int64_t num_tiles = (end - begin + tile_rows - 1) / tile_rows;
    blocks.push_back({expert, static_cast<int32_t>(num_tiles), static_cast<int64_t>(tiles.size()),
                      begin, end - begin});
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first = begin + (end - begin) * t / num_tiles;
      const int64_t last = begin + (end - begin) * (t + 1) / num_tiles;
      tiles.push_back({first, static_cast<int>(last - first)});
    }
  }
}

void Plan::build(int64_t rows, int tile_rows, int block_rows) {
  blocks.clear();
  tiles.clear();
  add_blocks(0, 0, rows, tile_rows, block_rows);
}

void Plan::build(int64_t tokens, ExpertRange range, int32_t capacity, int tile_rows, int block_rows,
                 const int32_t* k, const int32_t* experts, const float* weights) {
  num_tokens = tokens;
  next_row_.assign(range.count, 0);
  token_begin.resize(tokens + 1);
  token_begin[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    token_begin[t + 1] = token_begin[t];
    for (int32_t j = 0; j < k[t]; ++j) {
      const int32_t expert = experts[t * capacity + j];
      if (!is_in(range, expert)) continue;
      ++token_begin[t + 1];
      ++next_row_[expert - range.first];
    }
  }

  blocks.clear();
  tiles.clear();
  num_experts_used = 0;
  int64_t row = 0;
  for (int32_t e = 0; e < range.count; ++e) {
    const int64_t rows = next_row_[e];
    next_row_[e] = row;
    if (rows == 0) continue;
    ++num_experts_used;
    add_blocks(e, row, rows, tile_rows, block_rows);
    row += rows;
  }

  row_token.resize(row);
  token_rows.resize(row);
  token_weights.resize(row);
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t place = token_begin[t];
    for (int32_t j = 0; j < k[t]; ++j) {
      const int32_t expert = experts[t * capacity + j];
      if (!is_in(range, expert)) continue;
      const int64_t to = next_row_[expert - range.first]++;
      row_token[to] = t;
      token_rows[place] = to;
      token_weights[place++] = weights[t * capacity + j];
    }
  }
}

}  // namespace adaptive_k::cpu
