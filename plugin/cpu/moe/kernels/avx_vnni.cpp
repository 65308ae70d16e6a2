// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/avx2.h"

namespace adaptive_k::cpu {
namespace {
constexpr bool kVnni = true;
}
}  // namespace adaptive_k::cpu

#include "cpu/moe/kernels/avx2_integers.h"
#include "cpu/moe/kernels/integer_impl.h"

namespace adaptive_k::cpu {
const Kernels kAvxVnniIntegerKernels = integer_kernels("avx_vnni");
}  // namespace adaptive_k::cpu
