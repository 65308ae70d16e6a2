// SPDX-License-Identifier: Apache-2.0
#include "operator/mamba/shapes.h"

#include <stdexcept>
#include <string>

namespace adaptive_k {
namespace {

[[noreturn]] void fail(const std::string& sentence) { throw std::invalid_argument(sentence); }

}  // namespace

MambaSizes check_shapes(const MambaParams& params, const Shapes<Mamba>& shapes) {
  const Binder b = bind_shapes<Mamba>(params, shapes);
  const MambaSizes sizes{b.value("T"), b.value("S"),     b.value("slots"), b.value("channels"),
                         b.value("K"), b.value("heads"), b.value("P"),     b.value("N")};
  if (sizes.taps >= 0 && (sizes.taps < 2 || sizes.taps > kMambaMaxTaps))
    fail("input conv_weight has " + std::to_string(sizes.taps) + " taps but must have 2 to " +
         std::to_string(kMambaMaxTaps));
  if (const char* wrong = check_attributes(params, sizes.heads < 0 ? 0 : sizes.heads))
    fail(std::string("attribute ") + wrong + " (" + describe<Mamba>(params) +
         (sizes.heads < 0 ? "" : ", " + std::to_string(sizes.heads) + " heads") + ")");
  if (sizes.heads == 0 || sizes.head_dim == 0 || sizes.state_size == 0)
    fail("input ssm_state has an empty dimension");
  if (sizes.heads > 0 && sizes.head_dim > 0 && sizes.state_size > 0 && sizes.channels >= 0) {
    const int64_t width = sizes.heads * sizes.head_dim + 2 * params.n_groups * sizes.state_size;
    if (sizes.channels != width)
      fail("input conv_input has " + std::to_string(sizes.channels) +
           " channels but heads * P + 2 * n_groups * N is " + std::to_string(width));
  }
  return sizes;
}

}  // namespace adaptive_k
