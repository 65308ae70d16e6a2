// SPDX-License-Identifier: Apache-2.0
// For any processor: vectors of four floats in the compiler's own extension.
#include <cstring>

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace adaptive_k::cpu {
namespace {

struct MambaSimd {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static V zero() { return V{0, 0, 0, 0}; }
  static V broadcast(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
#if defined(__ARM_NEON) && defined(__aarch64__)
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
  // Rounded twice: the build turns contraction off.
  static V fma(V a, V b, V c) { return a * b + c; }
  static float fma(float a, float b, float c) { return a * b + c; }
#endif
};

}  // namespace
}  // namespace adaptive_k::cpu

#include "cpu/machine.h"
#include "cpu/mamba/kernels/impl.h"

namespace adaptive_k::cpu {

const MambaKernels kPortableMambaKernels = {"portable", convolve, scan};

const MambaKernels& mamba_kernels() {
#if defined(ADAPTIVE_K_X86)
  if (instruction_set() >= InstructionSet::kAvx512) return kAvx512MambaKernels;
  if (instruction_set() == InstructionSet::kAvx2) return kAvx2MambaKernels;
#endif
  return kPortableMambaKernels;
}

}  // namespace adaptive_k::cpu
