// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

namespace adaptive_k::cpu {
namespace {

struct MambaSimd {
  using V = __m256;
  static constexpr int kLanes = 8;
  static V zero() { return _mm256_setzero_ps(); }
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

}  // namespace
}  // namespace adaptive_k::cpu

#include "cpu/mamba/kernels/impl.h"

namespace adaptive_k::cpu {
const MambaKernels kAvx2MambaKernels = {"avx2", convolve, scan};
}  // namespace adaptive_k::cpu
