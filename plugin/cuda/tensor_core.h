// SPDX-License-Identifier: Apache-2.0
// The tensor-core product of a warp, and copies to shared memory that run beside it.
#pragma once

#include "cuda/device.h"
#include "cuda/numeric.h"

namespace adaptive_k::cuda {

#if defined(ADAPTIVE_K_SIMT)
struct MmaPayload {
  const uint32_t* a;
  const uint32_t* b;
  float* c;
};

template <typename T>
float mma_value(uint32_t word, int half) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * half))});
}

// Lane 4 g + q holds: of a, rows g and g + 8, columns 2q, 2q + 1 and the same + 8; of b, rows 2q,
// 2q + 1 and + 8 of column g; of c, rows g and g + 8, columns 2q and 2q + 1.
template <typename T>
const char* resolve_mma(void* const payloads[simt::kWarp]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    if (payloads[lane] == nullptr) return "mma.sync needs all lanes of the warp";
    const auto& p = *static_cast<MmaPayload*>(payloads[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][2 * q + half + 8 * (i / 2)] = mma_value<T>(p.a[i], half);
      for (int i = 0; i < 2; ++i) b[2 * q + half + 8 * i][g] = mma_value<T>(p.b[i], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<MmaPayload*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = p.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      p.c[i] = sum;
    }
  }
  return nullptr;
}

struct LoadMatricesPayload {
  const void* row;
  uint32_t* to;
  bool transposed;
};

inline const char* resolve_load_matrices(void* const payloads[simt::kWarp]) {
  for (int lane = 0; lane < 32; ++lane)
    if (payloads[lane] == nullptr) return "ldmatrix needs all lanes of the warp";
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<LoadMatricesPayload*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int row = mine.transposed ? 2 * (lane % 4) + half : lane / 4;
        const int column = mine.transposed ? lane / 4 : 2 * (lane % 4) + half;
        const auto& given = *static_cast<LoadMatricesPayload*>(payloads[8 * i + row]);
        std::memcpy(&pair[half], static_cast<const uint16_t*>(given.row) + column, 2);
      }
      mine.to[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
  return nullptr;
}
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8
// of matrix l / 8. Lane 4 g + q gets of each row g, columns 2q and 2q + 1, of its transpose where
// kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&to)[4]) {
#if defined(ADAPTIVE_K_SIMT)
  simt::require_aligned(static_cast<const char*>(row), 16);
  LoadMatricesPayload payload = {row, to, kTransposed};
  simt::warp_operation(kAllLanes, &resolve_load_matrices, &payload, "ldmatrix");
#else
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// c += a . b for the warp's 16 x 16 a and 16 x 8 b, in the layout of mma.sync.m16n8k16.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(ADAPTIVE_K_SIMT)
  MmaPayload payload = {a, b, c};
  simt::warp_operation(kAllLanes, &resolve_mma<T>, &payload, "mma.sync");
#else
  if constexpr (T::kIsBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Starts the copy of 16 bytes to shared memory, or of zeros; from is not read then.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool valid) {
#if defined(ADAPTIVE_K_SIMT)
  static const uint4 zeros = {0, 0, 0, 0};
  simt::copy_async(shared, valid ? from : &zeros, 16);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
               : "memory");
#endif
}

// Closes the group of copies that this thread has started.
__device__ __forceinline__ void copy_async_commit() {
#if defined(ADAPTIVE_K_SIMT)
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
#if defined(ADAPTIVE_K_SIMT)
  simt::copy_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace adaptive_k::cuda
