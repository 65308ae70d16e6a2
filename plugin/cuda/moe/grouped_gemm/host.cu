// SPDX-License-Identifier: Apache-2.0
#if !defined(ADAPTIVE_K_SIMT)
#error "this file stands in for CUTLASS in the interpreter's build; do not ship it"
#endif

#include "cuda/device.h"
#include "cuda/moe/activate.h"
#include "cuda/moe/grouped_gemm.h"
#include "cuda/numeric.h"

namespace adaptive_k::cuda {

bool grouped_gemm_supports(ElementType) { return true; }

size_t grouped_gemm_workspace(int32_t) { return 256; }

cudaError_t grouped_gemm(const GroupedGemm& p, void*, cudaStream_t) {
  return with_element(p.element, [&](auto t) {
    using T = decltype(t);
    const T* a = static_cast<const T*>(p.a);
    T* c = static_cast<T*>(p.c);
    for (int32_t e = 0; e < p.experts; ++e) {
      const T* b = static_cast<const T*>(p.b) + static_cast<int64_t>(e) * p.n * p.k;
      const int shift = fault(kFaultGroupedOffset) && p.offsets[e] > 0 ? 1 : 0;
      for (int64_t row = p.offsets[e] - shift; row < p.offsets[e + 1]; ++row) {
        for (int32_t n = 0; n < p.n; ++n) {
          float sum = 0;
          for (int32_t k = 0; k < p.k; ++k)
            sum += to_float(a[row * p.k + k]) * to_float(b[static_cast<int64_t>(n) * p.k + k]);
          if (p.activated) sum = activate(p.activation, sum, sum);
          c[row * p.n + n] = from_float<T>(sum);
        }
      }
    }
    return cudaSuccess;
  });
}

}  // namespace adaptive_k::cuda
