// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

namespace adaptive_k::cpu {
namespace {

struct MambaSimd {
  using V = __m512;
  static constexpr int kLanes = 16;
  static V zero() { return _mm512_setzero_ps(); }
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

}  // namespace
}  // namespace adaptive_k::cpu

#include "cpu/mamba/kernels/impl.h"

namespace adaptive_k::cpu {
const MambaKernels kAvx512MambaKernels = {"avx512", convolve, scan};
}  // namespace adaptive_k::cpu
