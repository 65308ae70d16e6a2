// SPDX-License-Identifier: Apache-2.0
// A block computes a tile of rows by 128 weight rows in steps of 64 along K, with copies of later
// steps under way. Tiles of 128 rows, of which each of eight warps has 64 by 32, are for many rows
// an expert: the more rows share a warp's unpacked weights, the fewer instructions a product takes.
// Tiles of 32 rows, 32 by 16 a warp, are for few.
//
// The integers are exact as 16-bit floats, so the tensor cores multiply them as they are, and each
// group's sums are scaled in float32: the same numbers as in the decode kernels, up to the order of
// addition.
//
// Along K a lane of a warp takes 8 neighbours out of each 32 rather than the pairs that mma.sync
// names. The same for activations and weights, this changes only the order of the sum; but it lets
// a lane read its part in one wide access instead of many of two bytes.
//
// For a gated expert half of each warp's weight rows are gates and half the ups of the same
// neurons, so that a thread holds both and applies the activation before anything is written.
#include "cuda/device.h"
#include "cuda/moe/activate.h"
#include "cuda/moe/mixed.h"
#include "cuda/moe/weights.h"
#include "cuda/tensor_core.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kTileWeights = 128;
constexpr int kTileK = 64;
constexpr int kChunkK = 32;  // what one flush of sums covers
constexpr int kThreads = 256;
constexpr int kListThreads = 512;
static_assert(kListThreads >= kMaxExpertsOnGpu, "a thread for each expert");

// How a tile of so many rows is shared by the warps, and how often a multiprocessor holds it.
template <int kTileRows>
struct Tiling {
  static constexpr int kRows = kTileRows < 64 ? kTileRows : 64;  // of a warp
  static constexpr int kRowWarps = kTileRows / kRows;
  static constexpr int kWeights = kTileWeights * kRowWarps / (kThreads / 32);  // of a warp
  static constexpr int kRowParts = kRows / 16, kWeightParts = kWeights / 8;    // of mma.sync's
  static constexpr int kStages = kTileRows < 64 ? 4 : 3;
  static constexpr int kBlocks = kTileRows < 64 ? 2 : 1;
};

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
constexpr int kWeightVectors = kTileK * bits_of(format) / 128;  // of a row

template <WeightFormat format, int kTileRows>
struct MixedShared {
  struct Stage {
    uint4 x[kTileRows][kTileK / 8];
    uint4 w[kTileWeights][kWeightVectors<format>];
  };
  Stage stages[Tiling<kTileRows>::kStages];
};

// Where a row's 16-byte vector lies in shared memory, so that the lanes that read together find
// their data in different banks.
__device__ __forceinline__ int swizzle_x(int row, int vector) { return vector ^ (row % 2 * 4); }
template <WeightFormat format>
__device__ __forceinline__ int swizzle_w(int row, int vector) {
  constexpr int kVectors = kWeightVectors<format>;
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
  uint32_t pairs[4];
  unpack_pairs<T, format>(words.at, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = pairs[i];
}

template <typename T, WeightFormat format, int kTileRows>
__global__ void __launch_bounds__(kThreads, Tiling<kTileRows>::kBlocks)
    mixed_product(MixedArguments a) {
  using Tile = Tiling<kTileRows>;
  using Shared = MixedShared<format, kTileRows>;
  constexpr int kRowParts = Tile::kRowParts, kWeightParts = Tile::kWeightParts;
  auto& shared = shared_memory<Shared>();
  if (static_cast<int>(blockIdx.x) >= *a.num_tiles) return;  // the whole block
  const RowTile tile = a.tiles[blockIdx.x];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group_of_lanes = lane / 4, quad = lane % 4;
  const int warp_row = warp % Tile::kRowWarps * Tile::kRows;
  const int warp_column = warp / Tile::kRowWarps * Tile::kWeights;

  // The weight row (within the expert) of a row of the tile. Past the end the last neuron's is
  // repeated, and nothing is written.
  const int tile_neurons = a.gated ? kTileWeights / 2 : kTileWeights;
  const int first_neuron = static_cast<int>(blockIdx.y) * tile_neurons;
  const auto weight_row = [&](int r) {
    constexpr int kHalf = Tile::kWeights / 2;
    int neuron = first_neuron + r;
    if (a.gated) neuron = first_neuron + r / Tile::kWeights * kHalf + r % kHalf;
    neuron = neuron < a.neurons ? neuron : a.neurons - 1;
    return neuron + (a.gated && r % Tile::kWeights >= kHalf ? a.neurons : 0);
  };
  const int64_t expert_row = static_cast<int64_t>(tile.expert) * a.n;

  // What this thread copies in every step: always the same 16 bytes of some rows' share.
  constexpr int kXVectors = kTileK / 8, kWVectors = kWeightVectors<format>;
  constexpr int kXCopies = kTileRows * kXVectors / kThreads;
  constexpr int kWCopies = kTileWeights * kWVectors / kThreads;
  constexpr int kPerVector = WeightVector<T, format>::kSize;
  const int x_vector = thread % kXVectors, w_vector = thread % kWVectors;
  const unsigned char* x_from[kXCopies];
  const unsigned char* w_from[kWCopies];
#pragma unroll
  for (int i = 0; i < kXCopies; ++i) {
    // Rows past the tile's are the last one again.
    int row = thread / kXVectors + i * (kThreads / kXVectors);
    row = tile.first_row + (row < tile.num_rows ? row : tile.num_rows - 1);
    const int64_t source = a.row_token != nullptr ? a.row_token[row] : row;
    x_from[i] = static_cast<const unsigned char*>(a.x) + (source * a.k + x_vector * 8) * 2;
  }
#pragma unroll
  for (int i = 0; i < kWCopies; ++i) {
    const int64_t row = expert_row + weight_row(thread / kWVectors + i * (kThreads / kWVectors));
    w_from[i] = static_cast<const unsigned char*>(a.w) + (row * (a.k / kPerVector) + w_vector) * 16;
  }
  const int steps = (a.k + kTileK - 1) / kTileK;
  const auto copy_step = [&](int step) {
    if (step < steps) {
      typename Shared::Stage& stage = shared.stages[step % Tile::kStages];
      const bool x_valid = step * kTileK + x_vector * 8 < a.k;
      const bool w_valid = step * kTileK + w_vector * kPerVector < a.k;
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        const int row = thread / kXVectors + i * (kThreads / kXVectors);
        copy_async(&stage.x[row][swizzle_x(row, x_vector)], x_from[i], x_valid);
        x_from[i] += kTileK * 2;
      }
#pragma unroll
      for (int i = 0; i < kWCopies; ++i) {
        const int row = thread / kWVectors + i * (kThreads / kWVectors);
        copy_async(&stage.w[row][swizzle_w<format>(row, w_vector)], w_from[i], w_valid);
        w_from[i] += kWVectors * 16;
      }
    }
    copy_async_commit();  // an empty group keeps the count right
  };

  float total[kRowParts][kWeightParts][4] = {}, scale[kWeightParts][2] = {};
  const auto row_scales = static_cast<uint32_t>(a.k / a.group_size);
  const T* const scales = static_cast<const T*>(a.scales) + expert_row * row_scales;
  uint32_t scale_row[kWeightParts][2];
#pragma unroll
  for (int ni = 0; ni < kWeightParts; ++ni) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      scale_row[ni][j] =
          static_cast<uint32_t>(weight_row(warp_column + ni * 8 + quad * 2 + j)) * row_scales;
  }
  int group = -1, chunks_of_group = 0;  // that are left of the group

#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    if (!fault(kFaultMixedWait)) copy_async_wait<Tile::kStages - 2>();
    // Everybody's copies of this step have arrived, and everybody has done with the stage that the
    // next copies overwrite.
    if (!fault(kFaultMixedBarrier)) __syncthreads();
    copy_step(step + Tile::kStages - 1);
    const typename Shared::Stage& stage = shared.stages[step % Tile::kStages];
#pragma unroll
    for (int chunk = 0; chunk < kTileK / kChunkK; ++chunk) {
      const int k = step * kTileK + chunk * kChunkK;
      if (k >= a.k) break;
      if (chunks_of_group == 0) {                                  // long before they are needed
        chunks_of_group = (a.group_size + kChunkK - 1) / kChunkK;  // a whole row may end within one
        group = fault(kFaultMixedScale) ? 0 : group + 1;
#pragma unroll
        for (int ni = 0; ni < kWeightParts; ++ni) {
#pragma unroll
          for (int j = 0; j < 2; ++j) scale[ni][j] = to_float(scales[scale_row[ni][j] + group]);
        }
      }
      --chunks_of_group;
      float sums[kRowParts][kWeightParts][4] = {};
      uint32_t b[kWeightParts][2][2];
#pragma unroll
      for (int ni = 0; ni < kWeightParts; ++ni) {
        const int row = warp_column + ni * 8 + group_of_lanes;
        load_weights<T, format>(stage.w[row], row, chunk, quad, b[ni]);
      }
#pragma unroll
      for (int mi = 0; mi < kRowParts; ++mi) {
        uint4 x[2];  // rows group_of_lanes and + 8; 8 values of this chunk
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_row + mi * 16 + h * 8 + group_of_lanes;
          x[h] = stage.x[row][swizzle_x(row, chunk * 4 + quad)];
        }
        const uint32_t first[4] = {x[0].x, x[1].x, x[0].y, x[1].y};
        const uint32_t second[4] = {x[0].z, x[1].z, x[0].w, x[1].w};
#pragma unroll
        for (int ni = 0; ni < kWeightParts; ++ni) mma<T>(sums[mi][ni], first, b[ni][0]);
#pragma unroll
        for (int ni = 0; ni < kWeightParts; ++ni) mma<T>(sums[mi][ni], second, b[ni][1]);
#pragma unroll
        for (int ni = 0; ni < kWeightParts; ++ni) {
#pragma unroll
          for (int j = 0; j < 4; ++j) total[mi][ni][j] += scale[ni][j % 2] * sums[mi][ni][j];
        }
      }
    }
  }
  copy_async_wait<0>();

  // A thread's neighbouring columns go out together: I and H are even.
#pragma unroll
  for (int mi = 0; mi < kRowParts; ++mi) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + mi * 16 + h * 8 + group_of_lanes;
      if (row >= tile.num_rows) continue;
      T* out = static_cast<T*>(a.out) + static_cast<int64_t>(tile.first_row + row) * a.neurons;
#pragma unroll
      for (int ni = 0; ni < kWeightParts; ++ni) {
        if (a.gated && ni >= kWeightParts / 2) continue;
        const int neuron =
            first_neuron + (a.gated ? warp_column / 2 : warp_column) + ni * 8 + quad * 2;
        if (neuron >= a.neurons) continue;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float gate = total[mi][ni][2 * h + j];
          float up = a.gated ? total[mi][(ni + kWeightParts / 2) % kWeightParts][2 * h + j] : gate;
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
    list_tiles(PlannedRows rows, int32_t tile_rows, RowTile* tiles, int32_t* num_tiles) {
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
  const int own = (count + tile_rows - 1) / tile_rows;
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
    const int left = count - t * tile_rows;
    tiles[before + t] = {e, first + t * tile_rows, left < tile_rows ? left : tile_rows};
  }
}

constexpr int kFewRows = 32;  // of a tile
constexpr int kManyRows = 128;

// By the mean number of rows of an expert.
int tile_rows(int64_t max_rows, int32_t num_experts) {
  return max_rows <= kFewRows * static_cast<int64_t>(num_experts) ? kFewRows : kManyRows;
}

cudaError_t launch_product(ElementType element, WeightFormat format, const MixedArguments& a,
                           const PlannedRows& rows, cudaStream_t stream) {
  const int tile_neurons = a.gated ? kTileWeights / 2 : kTileWeights;
  const dim3 grid(static_cast<unsigned>(mixed_max_tiles(rows.max_rows, rows.num_experts)),
                  static_cast<unsigned>(divide_up(a.neurons, tile_neurons)));
  const auto run = [&](auto t, auto chosen, auto tile) {
    using T = decltype(t);
    constexpr WeightFormat kFormat = decltype(chosen)::value;
    constexpr int kRows = decltype(tile)::value;
    constexpr size_t kShared = sizeof(MixedShared<kFormat, kRows>);
    if (kShared > 48 << 10)
      ADAPTIVE_K_RETURN_IF(allow_shared_memory(&mixed_product<T, kFormat, kRows>, kShared));
    return ADAPTIVE_K_LAUNCH((mixed_product<T, kFormat, kRows>), grid, dim3(kThreads), kShared,
                             stream, a);
  };
  const auto run_tile = [&](auto t, auto chosen) {
    return tile_rows(rows.max_rows, rows.num_experts) == kFewRows
               ? run(t, chosen, std::integral_constant<int, kFewRows>())
               : run(t, chosen, std::integral_constant<int, kManyRows>());
  };
  return with_quantised(format, [&](auto chosen) {
    return element == ElementType::kFloat16 ? run_tile(Half(), chosen)
                                            : run_tile(BFloat16(), chosen);
  });
}

}  // namespace

int64_t mixed_max_tiles(int64_t max_rows, int32_t num_experts) {
  const int64_t partial = max_rows < num_experts ? max_rows : num_experts;
  return max_rows / tile_rows(max_rows, num_experts) + partial;
}

cudaError_t mixed_tiles(const PlannedRows& rows, RowTile* tiles, int32_t* num_tiles,
                        cudaStream_t stream) {
  return ADAPTIVE_K_LAUNCH(list_tiles, dim3(1), dim3(kListThreads), kListThreads / 32 * sizeof(int),
                           stream, rows, tile_rows(rows.max_rows, rows.num_experts), tiles,
                           num_tiles);
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
  return launch_product(p.element, p.format, a, p.rows, stream);
}

}  // namespace adaptive_k::cuda
