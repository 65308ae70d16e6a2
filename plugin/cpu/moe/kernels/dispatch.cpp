// SPDX-License-Identifier: Apache-2.0
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/moe/kernels/kernels.h"

namespace adaptive_k::cpu {
namespace {

#if defined(ADAPTIVE_K_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Linux keeps the tiles' registers from a process until it asks for them.
bool has_amx() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The chosen set: its kernels, and those for bfloat16 weights where it has others.
struct Chosen {
  const char* name;
  const Kernels& general;
  const Kernels& bfloat16;
  explicit Chosen(const Kernels& all) : Chosen(all, all) {}
  Chosen(const Kernels& others, const Kernels& of_bfloat16)
      : name(of_bfloat16.name), general(others), bfloat16(of_bfloat16) {}
};

Chosen choose() {
  const char* forced = std::getenv("ADAPTIVE_K_ISA");
  const std::string isa = forced == nullptr ? "" : forced;
  if (isa == "portable") return Chosen(kPortableKernels);
#if defined(ADAPTIVE_K_X86)
  if ((isa.empty() || isa == "amx") && has_amx()) return Chosen(kAvx512Kernels, kAmxKernels);
  if ((isa.empty() || isa == "avx512") && has_avx512()) return Chosen(kAvx512Kernels);
  if ((isa.empty() || isa == "avx2") && has_avx2()) return Chosen(kAvx2Kernels);
#endif
  if (isa.empty()) return Chosen(kPortableKernels);
  throw std::invalid_argument("ADAPTIVE_K_ISA is '" + isa +
                              "', which this machine or build does not have; use portable, avx2, "
                              "avx512 or amx, or leave it unset");
}

const Chosen& chosen() {
  static const Chosen once = choose();
  return once;
}

}  // namespace

const char* instruction_set() { return chosen().name; }

const Kernels& kernels(WeightFormat format) {
  return format == WeightFormat::kBFloat16 ? chosen().bfloat16 : chosen().general;
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
