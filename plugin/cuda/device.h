// SPDX-License-Identifier: Apache-2.0
// What the kernels need beyond CUDA's own names, in two versions: for nvcc, and for the interpreter
// that runs the same kernels on the host in tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(ADAPTIVE_K_SIMT)
#include "testing/simt/simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace adaptive_k::cuda {

// Wrong steps that tests can ask for, to see that a test fails then. Each names what goes wrong.
// They exist in the interpreter's build only.
enum Fault : int {
  kNoFault = 0,
  kFaultRouteEntropy,  // an expert left out of the entropy's sum
  kFaultRouteTie,      // the higher index wins a tie
  kFaultRouteWeight,   // weights not divided by their sum
  kFaultRouteBarrier,
  kFaultRouteNorm,           // contributions without the norms
  kFaultShareMask,           // experts that are not read can be selected again
  kFaultShareStartBarrier,   // no barrier between routing alone and sharing
  kFaultShareBarrier,        // no barrier between marking what is read and reading it
  kFaultShareWorthBarrier,   // no barrier between an expert's worth and its comparison with others
  kFaultShareChunkBarrier,   // no barrier before the bitmap takes the next chunk of tokens
  kFaultPlanRank,            // ranks within a chunk ignore their own word of the bitmap
  kFaultPlanBase,            // earlier chunks of tokens not counted
  kFaultPlanStartBarrier,    // no barrier between clearing the bitmap (and routing) and filling it
  kFaultPlanBarrier,         // no barrier between filling the bitmap and reading it
  kFaultPlanRange,           // the first expert of a range left out
  kFaultDecodeRow,           // the last row of an expert repeats the one before it
  kFaultDecodeTail,          // the end of a weight row left out
  kFaultDecodeScale,         // the first group's scale taken for all
  kFaultDecodeColumns,       // the sums of the lanes of a weight row not kept apart
  kFaultDecodeBarrier,       // no barrier between partial sums and their reading
  kFaultDecodeReuseBarrier,  // no barrier before the partial sums are overwritten
  kFaultGatherRow,           // a row gathers its neighbour's token
  kFaultActivation,          // gate and up exchanged
  kFaultGroupedOffset,       // an expert's rows begin one late
  kFaultCombineRange,        // experts of others not left out of the sum
  kFaultCombineOrder,        // a token's last expert left out of the sum
  kFaultUpActivation,        // gate and up exchanged where decode and mixed products fuse them
  kFaultMixedScale,          // the first group's scale taken for all
  kFaultMixedWait,           // a tile used before its copies have arrived
  kFaultMixedBarrier,        // no barrier between copies and use
  kFaultMambaGroup,          // every head takes the first group's B and C
  kFaultMambaFreshConv,      // a sequence without a past convolves what lies in its slot
  kFaultMambaFresh,          // and starts from the state that lies there
  kFaultMambaConvOrder,      // the convolution's state moved up in falling order
  kFaultMambaDecay,          // the recurrence forgets nothing
  kFaultMambaRecurBarrier,   // no barrier between B, C and the step and their use
  kFaultMambaSumBarrier,     // no barrier between the warps' sums and their reading
  kFaultMambaCausal,         // a token of a chunk sees the ones behind it
  kFaultMambaPassState,      // a chunk does not see the states of the ones before it
  kFaultMambaTail,           // the last chunk takes in rows beyond the sequence's end
  kFaultMambaStateDecay,     // a chunk's tokens all reach its end undiminished
  kFaultMambaWait,           // a chunk used before its copies have arrived
  kFaultMambaChunkBarrier,   // no barrier between a chunk's products and their use
  kFaultMambaHalvesBarrier,  // no barrier between the two halves' sums
};

#if defined(ADAPTIVE_K_SIMT)
inline bool fault(Fault which) { return simt::fault() == which; }
#else
__host__ __device__ constexpr bool fault(Fault) { return false; }
#endif

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Lets a kernel have more shared memory than 48 KiB.
#if defined(ADAPTIVE_K_SIMT)
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel, size_t) {
  return cudaSuccess;
}
#else
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t size) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(size));
}
#endif

// The block's shared memory as a structure; the launch gives its size.
template <typename T>
__device__ __forceinline__ T& shared_memory(size_t size = sizeof(T)) {
#if defined(ADAPTIVE_K_SIMT)
  return *static_cast<T*>(simt::shared_memory(size));
#else
  (void)size;
  extern __shared__ __align__(128) unsigned char adaptive_k_shared[];
  return *reinterpret_cast<T*>(adaptive_k_shared);
#endif
}

// 16 bytes that are read once: past the L1 cache, by way of the read-only path.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
#if defined(ADAPTIVE_K_SIMT)
  simt::require_aligned(static_cast<const char*>(address), 16);
  uint4 v;
  std::memcpy(&v, address, sizeof v);
  return v;
#else
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#endif
}

// 16 bytes that other threads read too.
__device__ __forceinline__ uint4 load_vector(const void* address) {
#if defined(ADAPTIVE_K_SIMT)
  return load_streaming(address);
#else
  return *static_cast<const uint4*>(address);
#endif
}

__device__ __forceinline__ void store_vector(void* address, uint4 v) {
#if defined(ADAPTIVE_K_SIMT)
  simt::require_aligned(static_cast<const char*>(address), 16);
  std::memcpy(address, &v, sizeof v);
#else
  *static_cast<uint4*>(address) = v;
#endif
}

template <typename To, typename From>
__host__ __device__ __forceinline__ To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

constexpr unsigned kAllLanes = 0xffffffffu;

// ADAPTIVE_K_LAUNCH(kernel, grid, block, shared_size, stream, arguments...) returns an error code.
// A kernel with commas in its name stands in parentheses. More shared memory than 48 KiB must be
// allowed first.
#if defined(ADAPTIVE_K_SIMT)
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          size_t shared_size, cudaStream_t, Arguments... arguments) {
  return simt::run(name, grid, block, shared_size, [&] { kernel(arguments...); });
}
#define ADAPTIVE_K_LAUNCH(kernel, ...) \
  ::adaptive_k::cuda::launch_kernel(#kernel, kernel, __VA_ARGS__)
inline int multiprocessors() { return simt::multiprocessors(); }
#else
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_size,
                          cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_size;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#define ADAPTIVE_K_LAUNCH(kernel, ...) ::adaptive_k::cuda::launch_kernel(kernel, __VA_ARGS__)

// The current device's count. A query that neither synchronises nor disturbs a capture.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}
#endif

// Hands an error on.
#define ADAPTIVE_K_RETURN_IF(expression)                            \
  do {                                                              \
    const cudaError_t adaptive_k_status = (expression);             \
    if (adaptive_k_status != cudaSuccess) return adaptive_k_status; \
  } while (false)

}  // namespace adaptive_k::cuda
