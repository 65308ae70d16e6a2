// SPDX-License-Identifier: Apache-2.0
// An interpreter for CUDA kernels on the host, for tests: kernels written against plugin/cuda's
// device.h compile with the host compiler and run here, every thread of a block as a fiber.
//
// What it does that a GPU does not: between two synchronisations the threads of a block run in
// random order (from a seed), one at a time, so that a result that hangs on a missing barrier
// comes out wrong; blocks run in random order; shared memory starts as garbage and has guarded
// ends under AddressSanitizer; barriers that not all threads reach, warp operations whose masks
// disagree, shuffles from lanes outside the mask, misaligned vector accesses and asynchronous
// copies read too early are errors or visible. It knows nothing of memory models, caches or time.
//
// One launch runs at a time; launches from several host threads wait for one another.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#include "testing/simt/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

namespace simt {

constexpr unsigned kWarp = 32;

struct ThreadIndices {
  dim3 thread, block, block_size, grid_size;
};

// The indices of the thread that runs now.
extern ThreadIndices current;

// What a warp operation does once all lanes of the mask have arrived: payloads[i] is what lane i
// brought, null for lanes outside the mask. Returns null or what is wrong.
using Resolve = const char* (*)(void* const payloads[kWarp]);

void barrier(const char* file, int line);
void warp_operation(unsigned mask, Resolve resolve, void* payload, const char* name);
unsigned lane();
// Gives another thread the turn, sometimes.
void maybe_yield();
// Ends the launch with this error.
[[noreturn]] void fail(const std::string& what);
void* shared_memory(size_t size);

// Asynchronous copies arrive when they are waited for, not earlier.
void copy_async(void* to, const void* from, size_t size);
void copy_async_commit();
void copy_async_wait(int groups_left);

cudaError_t run(const char* kernel, dim3 grid, dim3 block, size_t shared_size,
                const std::function<void()>& body);

// The number of the fault that tests ask for, 0 for none.
int fault();
int multiprocessors();

template <typename T>
struct ShufflePayload {
  T value, result;
  int source;
};

template <typename T>
const char* resolve_shuffle(void* const payloads[kWarp]) {
  for (unsigned i = 0; i < kWarp; ++i) {
    auto* mine = static_cast<ShufflePayload<T>*>(payloads[i]);
    if (mine == nullptr) continue;
    if (payloads[mine->source] == nullptr) return "a shuffle reads a lane that is not in its mask";
    mine->result = static_cast<ShufflePayload<T>*>(payloads[mine->source])->value;
  }
  return nullptr;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* name) {
  static_assert(std::is_arithmetic<T>::value, "shuffles take numbers");
  ShufflePayload<T> payload = {value, value, source};
  warp_operation(mask, &resolve_shuffle<T>, &payload, name);
  return payload.result;
}

unsigned ballot(unsigned mask, bool predicate);

template <typename T>
void require_aligned(const T* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("a misaligned vector access");
}

}  // namespace simt

#define threadIdx (::simt::current.thread)
#define blockIdx (::simt::current.block)
#define blockDim (::simt::current.block_size)
#define gridDim (::simt::current.grid_size)

#define __syncthreads() ::simt::barrier(__FILE__, __LINE__)

inline const char* simt_resolve_nothing(void* const*) { return nullptr; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int nothing = 0;
  ::simt::warp_operation(mask, &simt_resolve_nothing, &nothing, "__syncwarp");
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return ::simt::shuffle(mask, value, source & 31, "__shfl_sync");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ::simt::shuffle(mask, value, static_cast<int>(::simt::lane()) ^ bits, "__shfl_xor_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = static_cast<int>(::simt::lane());
  return ::simt::shuffle(mask, value, lane < delta ? lane : lane - delta, "__shfl_up_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const int lane = static_cast<int>(::simt::lane());
  return ::simt::shuffle(mask, value, lane + delta > 31 ? lane : lane + delta, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return ::simt::ballot(mask, predicate);
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return ::simt::ballot(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return ::simt::ballot(mask, predicate) == mask;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Atomics on integers. Another thread may have the turn just before.
template <typename T>
T atomicAdd(T* address, typename std::common_type<T>::type value) {
  static_assert(std::is_integral<T>::value, "sums of floats by atomics depend on their order");
  ::simt::maybe_yield();
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicOr(T* address, typename std::common_type<T>::type value) {
  ::simt::maybe_yield();
  const T old = *address;
  *address = old | value;
  return old;
}
