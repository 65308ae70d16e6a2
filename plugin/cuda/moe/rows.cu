// SPDX-License-Identifier: Apache-2.0
// Every thread handles 16 bytes of its result at a time.
#include "cuda/device.h"
#include "cuda/moe/activate.h"
#include "cuda/moe/rows.h"
#include "cuda/numeric.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__device__ __forceinline__ void load_floats(const T* from, float* to) {
  Vector16<T>::unpack(load_vector(from), to);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* x, const int32_t* row_token, RowRange rows, int32_t columns, T* packed) {
  constexpr int kSize = Vector16<T>::kSize;
  const int64_t row = static_cast<int64_t>(*rows.begin) + blockIdx.x;
  if (row >= *rows.end) return;
  const int64_t token = row_token[fault(kFaultGatherRow) && row > *rows.begin ? row - 1 : row];
  for (int c = threadIdx.x * kSize; c < columns; c += kThreads * kSize)
    store_vector(packed + row * columns + c, load_vector(x + token * columns + c));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(Activation activation, const T* u, RowRange rows, int32_t intermediate, T* h) {
  constexpr int kSize = Vector16<T>::kSize;
  const int64_t row = static_cast<int64_t>(*rows.begin) + blockIdx.x;
  if (row >= *rows.end) return;
  const bool gated = is_gated(activation);
  const T* from = u + row * intermediate * (gated ? 2 : 1);
  for (int c = threadIdx.x * kSize; c < intermediate; c += kThreads * kSize) {
    float gate[kSize], up[kSize];
    load_floats(from + c, gate);
    load_floats(from + c + (gated ? intermediate : 0), up);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      up[i] = fault(kFaultActivation) ? activate(activation, up[i], gate[i])
                                      : activate(activation, gate[i], up[i]);
    store_vector(h + row * intermediate + c, pack_floats(up, T()));
  }
}

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Y* y, const int32_t* token_rows, const float* weights, const int32_t* k,
                   int32_t capacity, int32_t hidden, T* output) {
  constexpr int kSize = Vector16<T>::kSize;
  const int64_t token = blockIdx.x;
  const int c = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kSize;
  if (c >= hidden) return;
  const int count = k[token] - (fault(kFaultCombineOrder) && k[token] > 1 ? 1 : 0);
  float sum[kSize] = {};
  for (int j = 0; j < count; ++j) {
    const float weight = weights[token * capacity + j];
    int64_t planned = token_rows[token * capacity + j];
    if (fault(kFaultCombineRange) && planned < 0) planned = 0;
    if (planned < 0) continue;  // another's expert
    const Y* row = y + planned * hidden + c;
    float value[kSize];
#pragma unroll
    for (int i = 0; i < kSize; i += Vector16<Y>::kSize) load_floats(row + i, value + i);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] += weight * value[i];
  }
  store_vector(output + token * hidden + c, pack_floats(sum, T()));
}

}  // namespace

cudaError_t gather_rows(ElementType element, const void* x, const int32_t* row_token,
                        const RowRange& rows, int64_t max_rows, int32_t columns, void* packed,
                        cudaStream_t stream) {
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    return ADAPTIVE_K_LAUNCH(gather_kernel<T>, dim3(static_cast<unsigned>(max_rows)),
                             dim3(kThreads), 0, stream, static_cast<const T*>(x), row_token, rows,
                             columns, static_cast<T*>(packed));
  });
}

cudaError_t activate_rows(ElementType element, Activation activation, const void* u,
                          const RowRange& rows, int64_t max_rows, int32_t intermediate, void* h,
                          cudaStream_t stream) {
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    return ADAPTIVE_K_LAUNCH(activate_kernel<T>, dim3(static_cast<unsigned>(max_rows)),
                             dim3(kThreads), 0, stream, activation, static_cast<const T*>(u), rows,
                             intermediate, static_cast<T*>(h));
  });
}

cudaError_t combine_rows(ElementType element, bool y_is_float, const void* y,
                         const int32_t* token_rows, const float* weights, const int32_t* k,
                         int64_t tokens, int32_t capacity, int32_t hidden, void* output,
                         cudaStream_t stream) {
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    // A few tokens alone should not be left to as many multiprocessors.
    const int64_t columns = kThreads * Vector16<T>::kSize;
    const dim3 grid(static_cast<unsigned>(tokens),
                    static_cast<unsigned>(divide_up(hidden, columns)));
    if (y_is_float)
      return ADAPTIVE_K_LAUNCH((combine_kernel<T, float>), grid, dim3(kThreads), 0, stream,
                               static_cast<const float*>(y), token_rows, weights, k, capacity,
                               hidden, static_cast<T*>(output));
    return ADAPTIVE_K_LAUNCH((combine_kernel<T, T>), grid, dim3(kThreads), 0, stream,
                             static_cast<const T*>(y), token_rows, weights, k, capacity, hidden,
                             static_cast<T*>(output));
  });
}

}  // namespace adaptive_k::cuda
