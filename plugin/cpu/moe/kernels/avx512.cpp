// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/avx512.h"

namespace adaptive_k::cpu {
namespace {
constexpr bool kVnni = false;
}
}  // namespace adaptive_k::cpu

#include "cpu/moe/kernels/avx512_integers.h"
#include "cpu/moe/kernels/integer_impl.h"

namespace adaptive_k::cpu {
const Kernels kAvx512Kernels = float_kernels("avx512");
const Kernels kAvx512IntegerKernels = integer_kernels("avx512");
}  // namespace adaptive_k::cpu
