// SPDX-License-Identifier: Apache-2.0
// Decode with int8 or int4 weights and 16-bit activations. Unpacking takes more instructions than
// the memory leaves time for, unless it is shared by the tokens and done on pairs: so a warp
// unpacks 16 weight rows to 16-bit numbers, exactly, and multiplies them by mma.sync, which adds in
// float32.
//
// A lane reads 16 bytes of each of two weight rows at once, and mma.sync adds up over the four
// lanes of a row. Those bytes may have another scale in each lane. So the eight columns of the
// activations are not eight tokens but two tokens for each of the four lanes, with zeros where the
// lane is another: the sums of the four lanes stay apart, and each is scaled by its own in float32.
// This is the float32 at which products meet; nothing but the unpacked weights, which are exact, is
// 16 bits.
//
// As in decode.cu a token's result does not depend on the other tokens, and two or four warps share
// the rows where they are few. For a gated expert the 16 rows are 8 gates and the ups of the same
// neurons.
#include "cuda/moe/decode_parts.h"
#include "cuda/moe/weights.h"
#include "cuda/tensor_core.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kWeightRows = 16;  // of a warp
constexpr int kTileTokens = 2;   // activation rows of a product
constexpr int kMostTiles = 4;
constexpr int kTokenRows = kMostTiles * kTileTokens;  // at most, of a pass
constexpr int kLanes = 4;                             // that share a weight row

// 16-byte pieces of each of a lane's two weight rows that are loaded before the first is used.
constexpr int pieces_ahead(int tiles) { return tiles == kMostTiles ? 2 : 4; }

struct IntegersShared {
  float partial[kDecodeWarps][kTokenRows][kWeightRows];
};

struct IntegersArguments {
  PlannedRows rows;
  const void* x;       // [*, K] of the element type
  const void* w;       // [E, N, K] quantised
  const void* scales;  // [E, N, K / group_size]
  void* out;
  int32_t pieces;      // of a weight row, 16 bytes each
  int32_t groups;      // scales of a weight row
  uint32_t per_group;  // ceil(2^31 / pieces of a group): to divide by
  int32_t n;           // weight rows of an expert
  int32_t neurons;     // columns of out: n, or n / 2 when gated
  int32_t split;       // warps that share a weight row
  bool gated;
  Activation activation;
};

// What a lane reads: row lane / 4 of the warp's, and the one that lies `rows_apart` further on.
template <typename T>
struct Operands {
  const unsigned char* w;
  const T* scales;
  int rows_apart;
};

template <typename T>
__device__ __forceinline__ void load_scales(const IntegersArguments& a, const Operands<T>& from,
                                            int piece, int j, float (&scales)[2][2]) {
  const auto at = static_cast<uint32_t>(piece < a.pieces ? piece : a.pieces - 1);
  // Exact: rows have fewer than 2^15.5 pieces.
  const auto group = static_cast<uint32_t>(static_cast<uint64_t>(at) * a.per_group >> 31);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    scales[r][j] = to_float(from.scales[static_cast<int64_t>(r * from.rows_apart) * a.groups +
                                        (fault(kFaultDecodeScale) ? 0 : group)]);
}

// Adds to acc[t] the products of this warp's pieces with tokens 2 t and 2 t + 1. mine: of the eight
// columns, this lane's belongs to its own pieces.
template <typename T, WeightFormat format, int kTiles>
__device__ __forceinline__ void multiply(const IntegersArguments& a, const Operands<T>& from,
                                         const unsigned char* const (&x_row)[kTiles], int part,
                                         float (&acc)[kTiles][4]) {
  constexpr int kWeights = WeightVector<T, format>::kSize;
  constexpr int kEights = kWeights / 8;  // a vector of x each
  constexpr int kWords = 4 / kEights;    // of the weights
  constexpr int kAhead = pieces_ahead(kTiles);
  const int lane = threadIdx.x % 32, quad = lane % kLanes;
  const bool mine = lane / kLanes % kLanes == quad || fault(kFaultDecodeColumns);
  const int pieces = a.pieces - (fault(kFaultDecodeTail) ? 1 : 0);
  const bool grouped = a.groups > 1;
  float scales[2][2];  // of row g or g + 8, for the lane whose sums this one gets
  load_scales(a, from, 0, 0, scales);
  load_scales(a, from, 0, 1, scales);
#pragma unroll 1
  for (int first = part * kAhead * kLanes; first < pieces; first += a.split * kAhead * kLanes) {
    uint4 w[kAhead][2];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int piece = first + u * kLanes + quad;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        w[u][r] = {0, 0, 0, 0};
        if (piece < pieces)
          w[u][r] = load_streaming(
              from.w + (static_cast<int64_t>(r * from.rows_apart) * a.pieces + piece) * 16);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int quads_first = first + u * kLanes;
      if (quads_first >= pieces) break;  // the whole warp
      const int piece = quads_first + quad;
      const bool reads = mine && piece < pieces;
      float sums[kTiles][4] = {};
      const uint32_t rows[2][4] = {{w[u][0].x, w[u][0].y, w[u][0].z, w[u][0].w},
                                   {w[u][1].x, w[u][1].y, w[u][1].z, w[u][1].w}};
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        uint32_t low[4], high[4];
        unpack_pairs<T, format>(rows[0] + e * kWords, low);
        unpack_pairs<T, format>(rows[1] + e * kWords, high);
        const uint32_t first_half[4] = {low[0], high[0], low[1], high[1]};
        const uint32_t second_half[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          uint4 x = {0, 0, 0, 0};
          if (reads) x = load_vector(x_row[t] + (static_cast<int64_t>(piece) * kEights + e) * 16);
          const uint32_t first_x[2] = {x.x, x.y}, second_x[2] = {x.z, x.w};
          mma<T>(sums[t], first_half, first_x);
          mma<T>(sums[t], second_half, second_x);
        }
      }
      if (grouped) {
        load_scales(a, from, quads_first + quad % 2 * 2, 0, scales);
        load_scales(a, from, quads_first + quad % 2 * 2 + 1, 1, scales);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[t][i] += scales[i / 2][i % 2] * sums[t][i];
      }
    }
  }
}

// The sums of `count` activation rows from planned row `row` on, left in shared.partial. kTiles
// pairs have room for them.
template <typename T, WeightFormat format, bool kUp, int kTiles>
__device__ __forceinline__ void multiply_rows(const IntegersArguments& a, const Operands<T>& from,
                                              int row, int count, int end, IntegersShared& shared) {
  constexpr int kPieceBytes = WeightVector<T, format>::kSize * static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned char* x_row[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int m = t * kTileTokens + lane / (4 * kLanes);
    int at = row + (m < count ? m : count - 1);
    if (fault(kFaultDecodeRow) && at == end - 1 && at > row) --at;
    const int64_t source = kUp ? a.rows.row_token[at] : at;
    x_row[t] = static_cast<const unsigned char*>(a.x) + source * a.pieces * kPieceBytes;
  }
  float acc[kTiles][4] = {};
  multiply<T, format, kTiles>(a, from, x_row, warp % a.split, acc);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A lane has the sums of two of the four lanes, and its neighbour those of the others.
      float sum = acc[t][2 * r] + acc[t][2 * r + 1];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      if (lane % 2 == 0)
        shared.partial[warp][t * kTileTokens + lane % kLanes / 2][lane / kLanes + 8 * r] = sum;
    }
  }
}

template <typename T, WeightFormat format, bool kUp>
__global__ void __launch_bounds__(kDecodeThreads, 3) decode_integers_product(IntegersArguments a) {
  auto& shared = shared_memory<IntegersShared>();
  const int slot = blockIdx.y;
  if (slot >= *a.rows.num_active) return;  // the whole block
  const int expert = a.rows.active[slot];
  const int begin = a.rows.offsets[expert];
  const int end = a.rows.offsets[expert + 1];

  // Teams of `split` warps have 16 weight rows each.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_team = neurons_of_team(a.gated, kWeightRows);
  const int outputs = kDecodeWarps / a.split * per_team;
  const int block_neuron = static_cast<int>(blockIdx.x) * outputs;
  // A team's neurons are all there or none: I and H are multiples of 16. Past the end it repeats
  // the last ones and writes nothing.
  int first_neuron = block_neuron + warp / a.split * per_team;
  if (first_neuron >= a.neurons) first_neuron = a.neurons - per_team;
  const int64_t weight_row = static_cast<int64_t>(expert) * a.n + first_neuron + lane / kLanes;
  Operands<T> from;
  from.w = static_cast<const unsigned char*>(a.w) + weight_row * a.pieces * 16;
  from.scales = static_cast<const T*>(a.scales) + weight_row * a.groups;
  from.rows_apart = a.gated ? a.neurons : kWeightRows / 2;

  for (int row = begin; row < end; row += kTokenRows) {
    const int count = end - row < kTokenRows ? end - row : kTokenRows;
    if (count <= kTileTokens) {
      multiply_rows<T, format, kUp, 1>(a, from, row, count, end, shared);
    } else if (count <= 2 * kTileTokens) {
      multiply_rows<T, format, kUp, 2>(a, from, row, count, end, shared);
    } else {
      multiply_rows<T, format, kUp, kMostTiles>(a, from, row, count, end, shared);
    }
    if (!fault(kFaultDecodeBarrier)) __syncthreads();

    write_neurons<T, kUp>(a, shared.partial, row, count);
    if (!fault(kFaultDecodeReuseBarrier)) __syncthreads();
  }
}

template <bool kUp>
cudaError_t launch_product(ElementType element, WeightFormat format, IntegersArguments a,
                           cudaStream_t stream) {
  const dim3 grid = divide_rows(&a, kWeightRows, [&](int split) {  // a warp has a turn's pieces
    return a.pieces >= 2 * split * kLanes * pieces_ahead(1);
  });
  const auto run = [&](auto t, auto chosen) {
    return ADAPTIVE_K_LAUNCH((decode_integers_product<decltype(t), decltype(chosen)::value, kUp>),
                             grid, dim3(kDecodeThreads), sizeof(IntegersShared), stream, a);
  };
  return with_quantised(format, [&](auto chosen) {
    return element == ElementType::kFloat16 ? run(Half(), chosen) : run(BFloat16(), chosen);
  });
}

}  // namespace

cudaError_t decode_integers(const Projection& p, cudaStream_t stream) {
  const int32_t piece = row_multiple(p.format);  // weights of 16 bytes
  const int64_t pieces_of_group = p.group_size / piece;
  IntegersArguments a = {};
  a.rows = p.rows;
  a.x = p.x;
  a.w = p.w;
  a.scales = p.scales;
  a.out = p.out;
  a.gated = p.gated();
  a.activation = p.activation;
  a.pieces = p.k / piece;
  a.groups = p.k / p.group_size;
  a.per_group = static_cast<uint32_t>(divide_up(int64_t{1} << 31, pieces_of_group));
  a.n = p.weight_rows();
  a.neurons = p.neurons;
  return p.up ? launch_product<true>(p.element, p.format, a, stream)
              : launch_product<false>(p.element, p.format, a, stream);
}

}  // namespace adaptive_k::cuda
