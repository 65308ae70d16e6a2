// SPDX-License-Identifier: Apache-2.0
// The recurrence token by token, which in decode is one update of the state: bound by reading and
// writing it. A block has 32 columns of one head's state of one sequence, a thread four of them in
// every 16th row, and the rows it needs first are on their way before it waits for anything else.
// Every element of the state belongs to one thread, so steps of several tokens need no barrier
// for it. The sums over the rows are formed in an order that depends on the shape alone.
#include "cuda/mamba/kernels.h"
#include "operator/mamba/params.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 32;  // of a block
constexpr int kVectors = kColumns / 4;
constexpr int kRowGroups = kThreads / kVectors;
constexpr int kRowsAhead = 8;  // that a thread loads before it uses the first

struct RecurrenceShared {
  float b[kMaxStateSizeOnGpu], c[kMaxStateSizeOnGpu];
  float partial[kWarps][kColumns];
  MambaStep<float> step;
};

// A thread's next rows of the state, those that there are; zeros where the state starts from zero.
__device__ __forceinline__ void load_rows(const float* column, int32_t first, int32_t rows,
                                          int32_t width, bool zeros, uint4 (&to)[kRowsAhead]) {
#pragma unroll
  for (int i = 0; i < kRowsAhead; ++i) {
    const int32_t row = first + i * kRowGroups;
    to[i] = uint4{0, 0, 0, 0};
    if (row < rows && !zeros) to[i] = load_vector(column + int64_t{row} * width);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) mamba_recur_kernel(MambaLayer layer, int32_t most) {
  auto& shared = shared_memory<RecurrenceShared>();
  const MambaSequence sequence = sequence_at(layer, static_cast<int32_t>(blockIdx.x));
  if (sequence.length == 0 || sequence.length > most) return;  // the whole block
  const int32_t head = static_cast<int32_t>(blockIdx.y);
  const int32_t first_column = static_cast<int32_t>(blockIdx.z) * kColumns;
  const int32_t width = layer.head_dim, rows = layer.state_size;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t column = first_column + thread % kVectors * 4;
  const int32_t row_group = thread / kVectors;
  const bool has_columns = column < width;
  const int64_t y_stride = int64_t{layer.heads} * width;
  T* y = static_cast<T*>(layer.y) + sequence.begin * y_stride + int64_t{head} * width;
  if (sequence.slot == kNoSlot) {
    for (int32_t i = thread; i < sequence.length * kColumns; i += kThreads)
      if (first_column + i % kColumns < width)
        y[i / kColumns * y_stride + first_column + i % kColumns] = from_float<T>(0.0f);
    return;
  }

  const T* mixed = static_cast<const T*>(layer.mixed);
  const T* dt = static_cast<const T*>(layer.dt);
  const int32_t b_channel = group_channel(layer, head);
  const int32_t c_channel = b_channel + layer.params.n_groups * rows;
  float* state =
      layer.ssm_state + (int64_t{sequence.slot} * layer.heads + head) * rows * width + column;
  for (int32_t t = 0; t < sequence.length; ++t) {
    const int64_t token = sequence.begin + t;
    const bool zeros = (t == 0 && sequence.fresh && !fault(kFaultMambaFresh)) || !has_columns;
    uint4 loaded[kRowsAhead];
    load_rows(state, row_group, rows, width, zeros, loaded);

    const T* row = mixed + token * layer.channels;
    for (int32_t n = thread; n < rows; n += kThreads) {
      shared.b[n] = to_float(row[b_channel + n]);
      shared.c[n] = to_float(row[c_channel + n]);
    }
    if (thread == 0)
      shared.step = mamba_step<float>(layer.params, to_float(dt[token * layer.heads + head]),
                                      layer.dt_bias[head], layer.a[head]);
    float x[4] = {};
    if (has_columns) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = to_float(row[head * width + column + i]);
    }
    if (!fault(kFaultMambaRecurBarrier)) __syncthreads();
    const float decay = fault(kFaultMambaDecay) ? 1.0f : expf(shared.step.log_decay);
    float taken[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) taken[i] = shared.step.dt * x[i];
    for (int32_t first = row_group; first < rows; first += kRowsAhead * kRowGroups) {
      if (first != row_group) load_rows(state, first, rows, width, zeros, loaded);
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int32_t n = first + i * kRowGroups;
        if (n >= rows) break;
        float values[4];
        Vector16<float>::unpack(loaded[i], values);
        const float b = shared.b[n], c = shared.c[n];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = decay * values[j] + b * taken[j];
          sum[j] += c * values[j];
        }
        if (has_columns) store_vector(state + int64_t{n} * width, pack_floats(values, float()));
      }
    }

    // Over the four row groups of the warp, then over the warps.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] += __shfl_xor_sync(kAllLanes, sum[j], 8);
      sum[j] += __shfl_xor_sync(kAllLanes, sum[j], 16);
    }
    if (thread % 32 < kVectors) {
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.partial[thread / 32][thread % kVectors * 4 + j] = sum[j];
    }
    if (!fault(kFaultMambaSumBarrier)) __syncthreads();
    const int32_t p = first_column + thread;
    if (thread < kColumns && p < width) {
      float total = layer.d[head] * to_float(row[head * width + p]);
      for (int w = 0; w < kWarps; ++w) total += shared.partial[w][thread];
      y[t * y_stride + p] = from_float<T>(total);
    }
    // What the next token puts into shared.b, shared.c and shared.step has been read: every warp
    // has passed the barrier above. Its sums wait for the barrier before them.
  }
}

}  // namespace

cudaError_t mamba_recur(ElementType element, const MambaLayer& layer, int32_t most,
                        cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(layer.sequences), static_cast<unsigned>(layer.heads),
                  static_cast<unsigned>(divide_up(layer.head_dim, kColumns)));
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    return ADAPTIVE_K_LAUNCH(mamba_recur_kernel<T>, grid, dim3(kThreads), sizeof(RecurrenceShared),
                             stream, layer, most);
  });
}

}  // namespace adaptive_k::cuda
