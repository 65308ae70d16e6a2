// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>

namespace adaptive_k::cpu {

void Plan::build(int64_t tokens, int32_t num_experts, int32_t capacity, int tile_rows,
                 const int32_t* k, const int32_t* experts, const float* weights) {
  num_tokens = tokens;
  next_row_.assign(num_experts, 0);
  token_begin.resize(tokens + 1);
  token_begin[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    token_begin[t + 1] = token_begin[t] + k[t];
    for (int32_t j = 0; j < k[t]; ++j) ++next_row_[experts[t * capacity + j]];
  }

  segments.clear();
  tiles.clear();
  int64_t row = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    const int64_t rows = next_row_[e];
    next_row_[e] = row;
    if (rows == 0) continue;
    const int64_t first_tile = static_cast<int64_t>(tiles.size());
    for (int64_t r = 0; r < rows; r += tile_rows)
      tiles.push_back({row + r, static_cast<int>(std::min<int64_t>(tile_rows, rows - r))});
    segments.push_back({e, static_cast<int32_t>(tiles.size() - first_tile), first_tile, row, rows});
    row += rows;
  }

  row_token.resize(row);
  token_rows.resize(row);
  token_weights.resize(row);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int32_t j = 0; j < k[t]; ++j) {
      const int64_t to = next_row_[experts[t * capacity + j]]++;
      row_token[to] = t;
      token_rows[token_begin[t] + j] = to;
      token_weights[token_begin[t] + j] = weights[t * capacity + j];
    }
  }
}

}  // namespace adaptive_k::cpu
