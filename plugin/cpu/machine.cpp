// SPDX-License-Identifier: Apache-2.0
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif
#if defined(ADAPTIVE_K_X86)
#include <cpuid.h>
#endif
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/machine.h"

namespace adaptive_k::cpu {
namespace {

#if defined(ADAPTIVE_K_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Compilers of this project's age do not know the name to ask for.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4)) != 0;
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// Linux keeps the tiles' registers from a process until it asks for them.
bool has_amx() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

InstructionSet choose() {
  const char* forced = std::getenv("ADAPTIVE_K_ISA");
  const std::string isa = forced == nullptr ? "" : forced;
#if defined(ADAPTIVE_K_X86)
  const auto wanted = [&](const char* name) { return isa.empty() || isa == name; };
  if (wanted("amx") && has_amx()) return InstructionSet::kAmx;
  if (wanted("avx512_vnni") && has_avx512_vnni()) return InstructionSet::kAvx512Vnni;
  if (wanted("avx512") && has_avx512()) return InstructionSet::kAvx512;
  if (wanted("avx_vnni") && has_avx_vnni()) return InstructionSet::kAvxVnni;
  if (wanted("avx2") && has_avx2()) return InstructionSet::kAvx2;
#endif
  if (isa.empty() || isa == "portable") return InstructionSet::kPortable;
  throw std::invalid_argument("ADAPTIVE_K_ISA is '" + isa +
                              "', which this machine or build does not have; use portable, avx2, "
                              "avx_vnni, avx512, avx512_vnni or amx, or leave it unset");
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet once = choose();
  return once;
}

const char* instruction_set_name() {
  constexpr const char* kNames[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"};
  return kNames[static_cast<int>(instruction_set())];
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
