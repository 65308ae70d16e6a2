// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/avx512.h"

namespace adaptive_k::cpu {
namespace {
constexpr bool kVnni = true;
}
}  // namespace adaptive_k::cpu

#include "cpu/moe/kernels/avx512_integers.h"
#include "cpu/moe/kernels/integer_impl.h"

namespace adaptive_k::cpu {
const Kernels kAvx512VnniIntegerKernels = integer_kernels("avx512_vnni");
}  // namespace adaptive_k::cpu
