// SPDX-License-Identifier: Apache-2.0
// Activations in CUTLASS's epilogues, on the float32 sums before they are rounded. By a value at
// run time, so that there is one product for all of them and for none.
#pragma once

#include <cutlass/array.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/moe/activate.h"

namespace adaptive_k::cuda {

// The gated activations need two columns and have a kernel of their own: here they count as none.
struct FragmentActivation {
  bool active = false;
  Activation activation = Activation::kRelu;
};

template <Activation kind, int kCount>
__device__ __forceinline__ void activate_each(cutlass::Array<float, kCount>& values) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = adaptive_k::activate<kind>(0.0f, values[i]);
}

// One branch for all values of a fragment.
template <int kCount>
__device__ __forceinline__ void activate_fragment(const FragmentActivation& how,
                                                  cutlass::Array<float, kCount>& values) {
  if (!how.active) return;
  switch (how.activation) {
    case Activation::kSilu:
      return activate_each<Activation::kSilu>(values);
    case Activation::kGelu:
      return activate_each<Activation::kGelu>(values);
    case Activation::kGeluTanh:
      return activate_each<Activation::kGeluTanh>(values);
    case Activation::kRelu:
      return activate_each<Activation::kRelu>(values);
    case Activation::kRelu2:
      return activate_each<Activation::kRelu2>(values);
    default:
      return;
  }
}

}  // namespace adaptive_k::cuda
