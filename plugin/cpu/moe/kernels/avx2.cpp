// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/avx2.h"

namespace adaptive_k::cpu {
namespace {
constexpr bool kVnni = false;
}
}  // namespace adaptive_k::cpu

#include "cpu/moe/kernels/avx2_integers.h"
#include "cpu/moe/kernels/integer_impl.h"

namespace adaptive_k::cpu {
const Kernels kAvx2Kernels = {"avx2", kLanes, kTileRows, kMaxBlockRows, sizeof(float),
                              false,  pack,   multiply,  activate,      combine};
const Kernels kAvx2IntegerKernels = {"avx2",
                                     1,
                                     kIntegerTileRows,
                                     kMaxBlockRows,
                                     1,
                                     true,
                                     pack_integers,
                                     multiply_integers,
                                     activate_integers,
                                     combine};
}  // namespace adaptive_k::cpu
