// SPDX-License-Identifier: Apache-2.0
// A warp multiplies four weight rows with up to four activation rows at once: its lanes read the
// weights 16 bytes each, side by side, with up to eight such loads under way, and the activations
// (small, shared by all warps, so in the L1 cache) once for the four weight rows. For a gated
// expert the four are the gates and the ups of two neurons, so that the activation needs no second
// kernel.
//
// Where there are few weight rows, two or all four warps of a block share them, each with every
// second or fourth piece of the row. Sums are formed in an order that depends on the shape alone: a
// lane's pieces in rising order, the lanes by a fixed tree, the warps in rising order. So a token's
// result does not depend on the other tokens.
//
// Quantised weights come here with float32 activations only, which are for tests;
// decode_integers.cu has the others.
#include "cuda/moe/decode_parts.h"
#include "cuda/moe/weights.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kWeightRows = 4;  // of a warp
constexpr int kTokenRows = 4;   // at most, of a pass

// 16-byte pieces of each weight row that are loaded before the first is used. With many activation
// rows two pieces do not fit into the registers; quantised pieces hold more weights and need more.
constexpr int pieces_ahead(WeightFormat format, int rows) {
  return rows <= (format == WeightFormat::kAsHiddenStates ? 2 : 1) ? 2 : 1;
}

// Blocks that a multiprocessor holds at once. The registers that this leaves a thread, 128 or 168,
// are as few as serve without spilling; the compiler for Blackwell takes more to have more loads
// under way.
constexpr int resident_blocks(WeightFormat format) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  (void)format;
  return 3;
#else
  return format == WeightFormat::kAsHiddenStates ? 4 : 3;
#endif
}

struct DecodeShared {
  float partial[kDecodeWarps][kTokenRows][kWeightRows];
};

// What the up- and the down-projection have in common.
struct DecodeArguments {
  PlannedRows rows;
  const void* x;       // [*, K] of the element type
  const void* w;       // [E, N, K]
  const void* scales;  // [E, N, K / group_size] or null
  void* out;
  int32_t k;           // the length of a row
  int32_t n;           // weight rows of an expert
  int32_t neurons;     // columns of out: n, or n / 2 when gated
  int32_t group_size;  // of k; k itself for one scale a row
  int32_t split;       // warps that share a weight row
  bool gated;
  Activation activation;
};

// S values from piece c of 16 bytes of weights, S being what 16 bytes of T hold.
template <typename T, WeightFormat format>
__device__ __forceinline__ void unpack_weights(const uint4& v, int c, float* to) {
  constexpr int kSize = Vector16<T>::kSize;
  if constexpr (format == WeightFormat::kAsHiddenStates) {
    Vector16<T>::unpack(v, to);
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    unpack_quantised<format, kSize>(words, c * kSize, to);
  }
}

// Rows as distances from a base, in 16-byte pieces (scales: in numbers): a pointer for each would
// take twice the registers.
template <typename T>
struct Operands {
  const unsigned char* w;
  const unsigned char* x;
  const T* scales;
  uint32_t w_row[kWeightRows];
  uint32_t x_row[kTokenRows];
  uint32_t scale_row[kWeightRows];
};

__device__ __forceinline__ const unsigned char* piece_at(const unsigned char* base, uint32_t row,
                                                         int piece) {
  return base + static_cast<uint64_t>(row + static_cast<uint32_t>(piece)) * 16;
}

// Adds to acc[m][r] the products of the lane's pieces of weight row r and activation row m.
template <typename T, WeightFormat format, int kRows>
__device__ __forceinline__ void multiply(const DecodeArguments& a, const Operands<T>& from,
                                         int first, int step,
                                         float (&acc)[kTokenRows][kWeightRows]) {
  constexpr int kWeights = WeightVector<T, format>::kSize;
  constexpr int kSize = Vector16<T>::kSize;
  constexpr int kPiecesAhead = pieces_ahead(format, kRows);
  const int pieces = a.k / kWeights - (fault(kFaultDecodeTail) ? 1 : 0);
#pragma unroll 1  // the loads ahead are written out; more would spill
  for (int v = first; v < pieces; v += kPiecesAhead * step) {
    uint4 loaded[kPiecesAhead][kWeightRows];
#pragma unroll
    for (int u = 0; u < kPiecesAhead; ++u) {
      if (v + u * step < pieces) {
#pragma unroll
        for (int r = 0; r < kWeightRows; ++r)
          loaded[u][r] = load_streaming(piece_at(from.w, from.w_row[r], v + u * step));
      }
    }
#pragma unroll
    for (int u = 0; u < kPiecesAhead; ++u) {
      const int piece = v + u * step;
      if (piece >= pieces) break;
      float sums[kRows][kWeightRows] = {};
#pragma unroll
      for (int c = 0; c < kWeights / kSize; ++c) {
        float xs[kRows][kSize];
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          Vector16<T>::unpack(
              load_vector(piece_at(from.x, from.x_row[m], piece * (kWeights / kSize) + c)), xs[m]);
#pragma unroll
        for (int r = 0; r < kWeightRows; ++r) {
          float ws[kSize];
          unpack_weights<T, format>(loaded[u][r], c, ws);
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              if constexpr (format == WeightFormat::kAsHiddenStates) {
                acc[m][r] += ws[i] * xs[m][i];
              } else {
                sums[m][r] += ws[i] * xs[m][i];
              }
            }
          }
        }
      }
      if constexpr (format != WeightFormat::kAsHiddenStates) {
        const int group = piece * kWeights / a.group_size;
#pragma unroll
        for (int r = 0; r < kWeightRows; ++r) {
          const float scale =
              to_float(from.scales[from.scale_row[r] + (fault(kFaultDecodeScale) ? 0 : group)]);
#pragma unroll
          for (int m = 0; m < kRows; ++m) acc[m][r] += scale * sums[m][r];
        }
      }
    }
  }
}

// Adds up each of kCount values (a power of two) over the warp's lanes. A lane ends with the sum of
// one of them in v[0] and gets its index back. In each step a lane gives half of its values away
// and takes its partner's part of the others, so that kCount values need about kCount shuffles. The
// tree of additions is the same for every kCount. By recursion, since every index must be a
// constant.
template <int kLeft, int kBits = 16, int kCount>
__device__ __forceinline__ int sum_over_lanes(float (&v)[kCount], int lane) {
  if constexpr (kBits == 0) {
    return 0;
  } else if constexpr (kLeft == 1) {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], kBits);
    return sum_over_lanes<1, kBits / 2>(v, lane);
  } else {
    constexpr int kHalf = kLeft / 2;
    const bool upper = (lane & kBits) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? v[i] : v[i + kHalf];
      const float kept = upper ? v[i + kHalf] : v[i];
      v[i] = kept + __shfl_xor_sync(kAllLanes, given, kBits);
    }
    return (upper ? kHalf : 0) + sum_over_lanes<kHalf, kBits / 2>(v, lane);
  }
}

// The sums of kRows activation rows over all lanes, left in shared.partial.
template <typename T, WeightFormat format, int kRows>
__device__ __forceinline__ void multiply_rows(const DecodeArguments& a, const Operands<T>& from,
                                              int part, DecodeShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float acc[kTokenRows][kWeightRows] = {};
  multiply<T, format, kRows>(a, from, part * 32 + lane, a.split * 32, acc);
  float sums[kRows * kWeightRows];
#pragma unroll
  for (int i = 0; i < kRows * kWeightRows; ++i) sums[i] = acc[i / kWeightRows][i % kWeightRows];
  const int index = sum_over_lanes<kRows * kWeightRows>(sums, lane);
  if (lane % (32 / (kRows * kWeightRows)) == 0)
    shared.partial[warp][index / kWeightRows][index % kWeightRows] = sums[0];
}

template <typename T, WeightFormat format, bool kUp>
__global__ void __launch_bounds__(kDecodeThreads, resident_blocks(format))
    decode_product(DecodeArguments a) {
  auto& shared = shared_memory<DecodeShared>();
  const int slot = blockIdx.y;
  if (slot >= *a.rows.num_active) return;  // the whole block
  const int expert = a.rows.active[slot];
  const int begin = a.rows.offsets[expert];
  const int end = a.rows.offsets[expert + 1];

  // Teams of `split` warps have four weight rows each.
  const int warp = threadIdx.x / 32;
  const int teams = kDecodeWarps / a.split;
  const int per_team = neurons_of_team(a.gated, kWeightRows);
  const int first_neuron = (static_cast<int>(blockIdx.x) * teams + warp / a.split) * per_team;
  const uint32_t row_pieces = static_cast<uint32_t>(a.k / WeightVector<T, format>::kSize);
  const uint32_t row_scales =
      format == WeightFormat::kAsHiddenStates ? 0 : static_cast<uint32_t>(a.k / a.group_size);
  const int64_t expert_row = static_cast<int64_t>(expert) * a.n;
  Operands<T> from;
  from.w = static_cast<const unsigned char*>(a.w) + expert_row * row_pieces * 16;
  from.x = static_cast<const unsigned char*>(a.x);
  from.scales = static_cast<const T*>(a.scales) + expert_row * row_scales;
#pragma unroll
  for (int r = 0; r < kWeightRows; ++r) {
    int neuron = first_neuron + (a.gated ? r % 2 : r);
    // Past the end a team repeats the last neuron and writes nothing.
    neuron = neuron < a.neurons ? neuron : a.neurons - 1;
    const auto row = static_cast<uint32_t>(neuron + (a.gated && r >= 2 ? a.neurons : 0));
    from.w_row[r] = row * row_pieces;
    from.scale_row[r] = row * row_scales;
  }

  for (int row = begin; row < end; row += kTokenRows) {
    const int count = end - row < kTokenRows ? end - row : kTokenRows;
#pragma unroll
    for (int m = 0; m < kTokenRows; ++m) {
      int at = row + (m < count ? m : count - 1);
      if (fault(kFaultDecodeRow) && at == end - 1 && at > begin) --at;
      const int source = kUp ? a.rows.row_token[at] : at;
      from.x_row[m] =
          static_cast<uint32_t>(source) * static_cast<uint32_t>(a.k / Vector16<T>::kSize);
    }
    const int part = warp % a.split;
    if (count == 1) {
      multiply_rows<T, format, 1>(a, from, part, shared);
    } else if (count == 2) {
      multiply_rows<T, format, 2>(a, from, part, shared);
    } else {
      multiply_rows<T, format, kTokenRows>(a, from, part, shared);
    }
    if (!fault(kFaultDecodeBarrier)) __syncthreads();

    write_neurons<T, kUp>(a, shared.partial, row, count);
    if (!fault(kFaultDecodeReuseBarrier)) __syncthreads();
  }
}

template <bool kUp>
cudaError_t launch_product(ElementType element, WeightFormat format, DecodeArguments a,
                           cudaStream_t stream) {
  const int64_t row_bytes = weight_bytes(element, format, a.k);  // a warp keeps a few pieces
  const dim3 grid =
      divide_rows(&a, kWeightRows, [&](int split) { return row_bytes >= 2 * split * 2 * 512; });
  const dim3 block(kDecodeThreads);
  return with_element(element, [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto chosen) {
      return ADAPTIVE_K_LAUNCH((decode_product<T, decltype(chosen)::value, kUp>), grid, block,
                               sizeof(DecodeShared), stream, a);
    };
    if constexpr (std::is_same_v<T, float>)
      if (is_quantised(format)) return with_quantised(format, run);
    return run(std::integral_constant<WeightFormat, WeightFormat::kAsHiddenStates>());
  });
}

}  // namespace

cudaError_t decode(const Projection& p, cudaStream_t stream) {
  if (is_quantised(p.format) && p.element != ElementType::kFloat32)
    return decode_integers(p, stream);
  DecodeArguments a = {};
  a.rows = p.rows;
  a.x = p.x;
  a.w = p.w;
  a.scales = p.scales;
  a.out = p.out;
  a.gated = p.gated();
  a.activation = p.activation;
  a.k = p.k;
  a.n = p.weight_rows();
  a.neurons = p.neurons;
  a.group_size = p.group_size;
  return p.up ? launch_product<true>(p.element, p.format, a, stream)
              : launch_product<false>(p.element, p.format, a, stream);
}

}  // namespace adaptive_k::cuda
