// SPDX-License-Identifier: Apache-2.0
// A block computes 64 rows by 128 weight rows in steps of 64 along K, with three steps of copies
// under way; each of its eight warps 32 by 32. The integers are exact as 16-bit floats, so the
// tensor cores multiply them as they are, and each group's sums are scaled in float32: the same
// numbers as in the decode kernels, up to the order of addition.
//
// Along K a lane of a warp takes 8 neighbours out of each 32 rather than the pairs that mma.sync
// names. The same for activations and weights, this changes only the order of the sum; but it lets
// a lane read its part in one wide access instead of many of two bytes.
//
// For a gated expert each warp's 32 weight rows are 16 gates and the 16 ups of the same neurons, so
// that a thread holds both and applies the activation before anything is written.
#include "cuda/device.h"
#include "cuda/moe/activate.h"
#include "cuda/moe/mixed.h"
#include "cuda/moe/weights.h"
#include "cuda/tensor_core.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kTileRows = 64;
constexpr int kTileWeights = 128;
constexpr int kTileK = 64;
constexpr int kChunkK = 32;  // what one flush of sums covers at least
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kListThreads = 512;
static_assert(kListThreads >= kMaxExpertsOnGpu, "a thread for each expert");

struct MixedArguments {
  const RowTile* tiles;
  const int32_t* num_tiles;
  const int32_t* row_token;  // null: rows are where they are
  const void* x;             // [*, K]
  const void* w;             // [E, N, K] quantised
  const void* scales;        // [E, N, K / group_size]
  void* out;                 // [rows, neurons]
  int32_t k, n, neurons, group_size;
  bool gated;
  bool activated;
  Activation activation;
};

template <WeightFormat format>
struct MixedShared {
  static constexpr int kWeightVectors = kTileK * bits_of(format) / 128;  // of a row
  struct Stage {
    uint4 x[kTileRows][kTileK / 8];
    uint4 w[kTileWeights][kWeightVectors];
  };
  Stage stages[kStages];
};

// Where a row's 16-byte vector lies in shared memory, so that the lanes that read together find
// their data in different banks.
__device__ __forceinline__ int swizzle_x(int row, int vector) { return vector ^ (row % 2 * 4); }
template <WeightFormat format>
__device__ __forceinline__ int swizzle_w(int row, int vector) {
  constexpr int kVectors = MixedShared<format>::kWeightVectors;
  return vector ^ (row / (8 / kVectors) % 2 * (kVectors / 2));
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// The lane's 8 weights of a chunk as 16-bit numbers, for two products of 16.
template <typename T, WeightFormat format>
__device__ __forceinline__ void load_weights(const uint4* row, int row_index, int chunk, int quad,
                                             uint32_t (&b)[2][2]) {
  // The 8 weights take as many bytes as one takes bits.
  struct alignas(bits_of(format)) Words {
    uint32_t at[bits_of(format) / 4];
  };
  constexpr int kLanes = 16 / sizeof(Words);  // that share a vector
  const int vector = swizzle_w<format>(row_index, 4 / kLanes * chunk + quad / kLanes);
  const Words words = reinterpret_cast<const Words*>(row + vector)[quad % kLanes];
  float values[8];
  unpack_quantised<format, 8>(words.at, 0, values);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
}

template <typename T, WeightFormat format>
__global__ void __launch_bounds__(kThreads, 1) mixed_product(MixedArguments a) {
  using Shared = MixedShared<format>;
  auto& shared = shared_memory<Shared>();
  if (static_cast<int>(blockIdx.x) >= *a.num_tiles) return;  // the whole block
  const RowTile tile = a.tiles[blockIdx.x];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group_of_lanes = lane / 4, quad = lane % 4;
  const int warp_row = warp % 2 * 32, warp_column = warp / 2 * 32;

  // The weight row (within the expert) of a row of the tile; -1 past the end.
  const int tile_neurons = a.gated ? kTileWeights / 2 : kTileWeights;
  const int first_neuron = static_cast<int>(blockIdx.y) * tile_neurons;
  const auto weight_row = [&](int r) {
    if (!a.gated) return first_neuron + r < a.neurons ? first_neuron + r : -1;
    const int neuron = first_neuron + r / 32 * 16 + r % 16;
    return neuron >= a.neurons ? -1 : r % 32 < 16 ? neuron : a.neurons + neuron;
  };

  // What this thread copies in every step.
  constexpr int kXCopies = kTileRows * (kTileK / 8) / kThreads;
  constexpr int kWCopies = kTileWeights * Shared::kWeightVectors / kThreads;
  constexpr int kPerVector = WeightVector<T, format>::kSize;
  const T* x_from[kXCopies];
  const unsigned char* w_from[kWCopies];
  const int64_t row_bytes = static_cast<int64_t>(a.k) / kPerVector * 16;
#pragma unroll
  for (int i = 0; i < kXCopies; ++i) {
    const int at = thread + i * kThreads, row = at / (kTileK / 8);
    x_from[i] = nullptr;
    if (row < tile.num_rows) {
      const int64_t planned = tile.first_row + row;
      const int64_t source = a.row_token != nullptr ? a.row_token[planned] : planned;
      x_from[i] = static_cast<const T*>(a.x) + source * a.k + at % (kTileK / 8) * 8;
    }
  }
#pragma unroll
  for (int i = 0; i < kWCopies; ++i) {
    const int at = thread + i * kThreads;
    const int row = weight_row(at / Shared::kWeightVectors);
    w_from[i] = row < 0 ? nullptr
                        : static_cast<const unsigned char*>(a.w) +
                              (static_cast<int64_t>(tile.expert) * a.n + row) * row_bytes +
                              at % Shared::kWeightVectors * 16;
  }
  const int steps = (a.k + kTileK - 1) / kTileK;
  const auto copy_step = [&](int step) {
    if (step < steps) {
      typename Shared::Stage& stage = shared.stages[step % kStages];
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        const int at = thread + i * kThreads, row = at / (kTileK / 8), vector = at % (kTileK / 8);
        const bool valid = x_from[i] != nullptr && step * kTileK + vector * 8 < a.k;
        copy_async(&stage.x[row][swizzle_x(row, vector)],
                   valid ? static_cast<const void*>(x_from[i] + step * kTileK) : a.x, valid);
      }
#pragma unroll
      for (int i = 0; i < kWCopies; ++i) {
        const int at = thread + i * kThreads, row = at / Shared::kWeightVectors;
        const int vector = at % Shared::kWeightVectors;
        const bool valid = w_from[i] != nullptr && step * kTileK + vector * kPerVector < a.k;
        copy_async(
            &stage.w[row][swizzle_w<format>(row, vector)],
            valid ? static_cast<const void*>(w_from[i] + step * (kTileK / kPerVector) * 16) : a.w,
            valid);
      }
    }
    copy_async_commit();  // an empty group keeps the count right
  };

  float total[2][4][4] = {}, sums[2][4][4] = {}, scale[4][2] = {};
  const int64_t row_scales = a.k / a.group_size;
  // Recomputed for each group: eight pointers kept would cost sixteen registers.
  const auto load_scales = [&](int group) {
#pragma unroll
    for (int ni = 0; ni < 4; ++ni) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = weight_row(warp_column + ni * 8 + quad * 2 + j);
        scale[ni][j] = to_float(static_cast<const T*>(
            a.scales)[(static_cast<int64_t>(tile.expert) * a.n + (row < 0 ? 0 : row)) * row_scales +
                      (fault(kFaultMixedScale) ? 0 : group)]);
      }
    }
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    if (!fault(kFaultMixedWait)) copy_async_wait<kStages - 2>();
    // Everybody's copies of this step have arrived, and everybody has done with the stage that the
    // next copies overwrite.
    if (!fault(kFaultMixedBarrier)) __syncthreads();
    copy_step(step + kStages - 1);
    const typename Shared::Stage& stage = shared.stages[step % kStages];
#pragma unroll
    for (int chunk = 0; chunk < kTileK / kChunkK; ++chunk) {
      const int k = step * kTileK + chunk * kChunkK;
      if (k >= a.k) break;
      if (k % a.group_size == 0) load_scales(k / a.group_size);  // long before they are needed
      uint4 x[2][2];  // rows group_of_lanes and + 8 of each 16; 8 values of this chunk
#pragma unroll
      for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_row + mi * 16 + h * 8 + group_of_lanes;
          x[mi][h] = stage.x[row][swizzle_x(row, chunk * 4 + quad)];
        }
      }
#pragma unroll
      for (int ni = 0; ni < 4; ++ni) {
        const int row = warp_column + ni * 8 + group_of_lanes;
        uint32_t b[2][2];
        load_weights<T, format>(stage.w[row], row, chunk, quad, b);
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
          const uint32_t first[4] = {x[mi][0].x, x[mi][1].x, x[mi][0].y, x[mi][1].y};
          const uint32_t second[4] = {x[mi][0].z, x[mi][1].z, x[mi][0].w, x[mi][1].w};
          mma<T>(sums[mi][ni], first, b[0]);
          mma<T>(sums[mi][ni], second, b[1]);
        }
      }
      if ((k + kChunkK) % a.group_size == 0 || k + kChunkK >= a.k) {
#pragma unroll
        for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
          for (int ni = 0; ni < 4; ++ni) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              total[mi][ni][j] += scale[ni][j % 2] * sums[mi][ni][j];
              sums[mi][ni][j] = 0;
            }
          }
        }
      }
    }
  }
  copy_async_wait<0>();

  // A thread's neighbouring columns go out together: I and H are even.
#pragma unroll
  for (int mi = 0; mi < 2; ++mi) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + mi * 16 + h * 8 + group_of_lanes;
      if (row >= tile.num_rows) continue;
      T* out = static_cast<T*>(a.out) + static_cast<int64_t>(tile.first_row + row) * a.neurons;
#pragma unroll
      for (int ni = 0; ni < 4; ++ni) {
        if (a.gated && ni >= 2) continue;
        const int neuron =
            first_neuron + (a.gated ? warp_column / 2 : warp_column) + ni * 8 + quad * 2;
        if (neuron >= a.neurons) continue;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float gate = total[mi][ni][2 * h + j];
          float up = a.gated ? total[mi][(ni + 2) % 4][2 * h + j] : gate;
          if (fault(kFaultUpActivation)) {
            const float other = gate;
            gate = up;
            up = other;
          }
          values[j] = a.activated ? activate(a.activation, gate, up) : up;
        }
        *reinterpret_cast<uint32_t*>(out + neuron) = pack_pair<T>(values[0], values[1]);
      }
    }
  }
}

// One block. Each expert's thread finds how many tiles come before its own.
__global__ void __launch_bounds__(kListThreads)
    list_tiles(PlannedRows rows, RowTile* tiles, int32_t* num_tiles) {
  struct Shared {
    int warp_tiles[kListThreads / 32];
  };
  auto& shared = shared_memory<Shared>();
  const int e = threadIdx.x, lane = e % 32, warp = e / 32;
  int first = 0, count = 0;
  if (e < rows.num_experts) {
    first = rows.offsets[e];
    count = rows.offsets[e + 1] - first;
  }
  const int own = (count + kTileRows - 1) / kTileRows;
  int before = own;  // inclusive first
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int more = __shfl_up_sync(kAllLanes, before, delta);
    if (lane >= delta) before += more;
  }
  if (lane == 31) shared.warp_tiles[warp] = before;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += shared.warp_tiles[w];
  if (e == kListThreads - 1) *num_tiles = before;
  before -= own;
  for (int t = 0; t < own; ++t) {
    const int left = count - t * kTileRows;
    tiles[before + t] = {e, first + t * kTileRows, left < kTileRows ? left : kTileRows};
  }
}

cudaError_t launch_product(ElementType element, WeightFormat format, const MixedArguments& a,
                           int64_t max_tiles, cudaStream_t stream) {
  const int tile_neurons = a.gated ? kTileWeights / 2 : kTileWeights;
  const dim3 grid(static_cast<unsigned>(max_tiles),
                  static_cast<unsigned>(divide_up(a.neurons, tile_neurons)));
  const auto run = [&](auto t, auto chosen) {
    using T = decltype(t);
    constexpr WeightFormat kFormat = decltype(chosen)::value;
    static_assert(sizeof(MixedShared<kFormat>) <= 48 << 10, "no attribute is needed");
    return ADAPTIVE_K_LAUNCH((mixed_product<T, kFormat>), grid, dim3(kThreads),
                             sizeof(MixedShared<kFormat>), stream, a);
  };
  return with_quantised(format, [&](auto chosen) {
    return element == ElementType::kFloat16 ? run(Half(), chosen) : run(BFloat16(), chosen);
  });
}

}  // namespace

int64_t mixed_max_tiles(int64_t max_rows, int32_t num_experts) {
  const int64_t partial = max_rows < num_experts ? max_rows : num_experts;
  return max_rows / kTileRows + partial;
}

cudaError_t mixed_tiles(const PlannedRows& rows, RowTile* tiles, int32_t* num_tiles,
                        cudaStream_t stream) {
  return ADAPTIVE_K_LAUNCH(list_tiles, dim3(1), dim3(kListThreads), kListThreads / 32 * sizeof(int),
                           stream, rows, tiles, num_tiles);
}

cudaError_t mixed(const Projection& p, const RowTile* tiles, const int32_t* num_tiles,
                  cudaStream_t stream) {
  MixedArguments a = {};
  a.tiles = tiles;
  a.num_tiles = num_tiles;
  a.row_token = p.up ? p.rows.row_token : nullptr;
  a.x = p.x;
  a.w = p.w;
  a.scales = p.scales;
  a.out = p.out;
  a.gated = p.gated();
  a.activated = p.up;
  a.activation = p.activation;
  a.k = p.k;
  a.n = p.weight_rows();
  a.neurons = p.neurons;
  a.group_size = p.group_size;
  return launch_product(p.element, p.format, a,
                        mixed_max_tiles(p.rows.max_rows, p.rows.num_experts), stream);
}

}  // namespace adaptive_k::cuda
