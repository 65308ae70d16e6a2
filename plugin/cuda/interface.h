// SPDX-License-Identifier: Apache-2.0
// What the launchers of both operators have in common. Plain C++; no kernel code is needed to
// include it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(ADAPTIVE_K_SIMT)
#include "testing/simt/runtime.h"  // host stand-ins for cudaError_t and cudaStream_t, tests only
#else
#include <cuda_runtime_api.h>
#endif

#if defined(__GNUC__)
#define ADAPTIVE_K_CUDA_API __attribute__((visibility("default")))
#else
#define ADAPTIVE_K_CUDA_API
#endif

namespace adaptive_k::cuda {

// The type of an operator's first input, and of all that its description calls "element". float32
// is there for tests and debugging: it runs without tensor cores.
enum class ElementType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

}  // namespace adaptive_k::cuda
