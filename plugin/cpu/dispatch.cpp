// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace adaptive_k::cpu {
namespace {

#if defined(ADAPTIVE_K_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels& choose() {
  const char* forced = std::getenv("ADAPTIVE_K_ISA");
  const std::string isa = forced == nullptr ? "" : forced;
  if (isa == "portable") return kPortableKernels;
#if defined(ADAPTIVE_K_X86)
  if ((isa.empty() || isa == "avx512") && has_avx512()) return kAvx512Kernels;
  if ((isa.empty() || isa == "avx2") && has_avx2()) return kAvx2Kernels;
#endif
  if (isa.empty()) return kPortableKernels;
  throw std::invalid_argument("ADAPTIVE_K_ISA is '" + isa +
                              "', which this machine or build does not have; use portable, avx2 or "
                              "avx512, or leave it unset");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t second_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t known = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    known = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return known > 0 ? known : int64_t{512} << 10;
  }();
  return bytes;
}

}  // namespace adaptive_k::cpu
