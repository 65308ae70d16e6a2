// SPDX-License-Identifier: Apache-2.0
// The order in which the experts' work is done: one row for each pair of a token and a selected
// expert, sorted by expert, so that an expert's weights are read once for all its tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "operator/moe/params.h"

namespace adaptive_k::cpu {

struct Plan {
  // Rows of one expert that are multiplied together with its weights.
  struct Block {
    int32_t expert;  // of those whose weights are given
    int32_t num_tiles;
    int64_t first_tile;
    int64_t first_row;
    int64_t num_rows;
  };
  // Rows of one block that share a register tile.
  struct TileRange {
    int64_t first_row;
    int rows;
  };

  int64_t num_tokens = 0;
  std::vector<Block> blocks;  // by expert; their rows lie one after the other
  int32_t num_experts_used = 0;
  std::vector<TileRange> tiles;
  std::vector<int64_t> row_token;    // [rows] the token of each row
  std::vector<int64_t> token_begin;  // [tokens + 1] where a token's part of the next two begins
  std::vector<int64_t> token_rows;   // the rows of each token, by rank
  std::vector<float> token_weights;  // the weights of each token, by rank

  int64_t num_rows() const { return static_cast<int64_t>(row_token.size()); }

  // k [tokens]; experts and weights [tokens, capacity], of which the first k count. Experts outside
  // the range get no rows. The rows of an expert are divided evenly into blocks of up to
  // block_rows, and those into tiles of up to tile_rows.
  void build(int64_t tokens, ExpertRange range, int32_t capacity, int tile_rows, int block_rows,
             const int32_t* k, const int32_t* experts, const float* weights);

  // Only `rows` rows of one expert, in blocks and tiles as above.
  void build(int64_t rows, int tile_rows, int block_rows);

 private:
  void add_blocks(int32_t expert, int64_t first_row, int64_t rows, int tile_rows, int block_rows);

  std::vector<int64_t> next_row_;  // [experts]
};

}  // namespace adaptive_k::cpu
