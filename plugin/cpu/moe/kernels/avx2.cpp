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
const Kernels kAvx2Kernels = float_kernels("avx2");
const Kernels kAvx2IntegerKernels = integer_kernels("avx2");
}  // namespace adaptive_k::cpu
