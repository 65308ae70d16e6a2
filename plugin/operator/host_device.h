// SPDX-License-Identifier: Apache-2.0
#pragma once

// Functions that CUDA kernels share with the host carry this mark. They are static because the CPU
// files that include them are compiled for different instruction sets: the copy of one must never
// serve another.
#if defined(__CUDACC__)
#define ADAPTIVE_K_HD __host__ __device__ static inline
#else
#define ADAPTIVE_K_HD static inline
#endif
