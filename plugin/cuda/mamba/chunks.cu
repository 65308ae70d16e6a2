// SPDX-License-Identifier: Apache-2.0
// The chunked scan. A block has 32 columns (p) of one head's state of one sequence and goes through
// the sequence's tokens in chunks of 32. With c_t the sum of the steps' log decays up to token t of
// a chunk and S the state before it:
//
//     y_t = exp(c_t) C_t S + sum over s <= t of (C_t . B_s) exp(c_t - c_s) dt_s x_s + D x_t
//     S   = exp(c_31) S + sum over s of exp(c_31 - c_s) dt_s B_s x_s
//
// Everything is multiplied transposed, y [p, t] and S [p, n], because a warp's piece of S, which it
// keeps in registers in float32 from the first chunk to the last, then has the layout of the first
// operand of C S, once it is rounded. Four warps: two halves of 16 columns, and for each two warps
// that share the sums over n (of C S) and over s, and have half of S each.
//
// Products are of the element type with sums in float32. A chunk's tokens are copied to shared
// memory while the one before is computed. A warp has as many lanes as a chunk has tokens, and each
// lane keeps its token's step.
//
// Source: Dao and Gu, "Transformers are SSMs" (2024), the block decomposition.
#include "cuda/mamba/kernels.h"
#include "cuda/tensor_core.h"

namespace adaptive_k::cuda {
namespace {

constexpr int kChunk = 32;
constexpr int kColumns = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kPiece = 8;              // numbers in 16 bytes
constexpr int kRow = kChunk + kPiece;  // of [.., 32]: so that eight rows lie in different banks
constexpr int kYRow = kColumns + 4;

// kStates: the state's size, rounded up to 64, 128 or 256; the columns beyond are zeros.
template <typename T, int kStates>
struct alignas(16) ChunkShared {
  static constexpr int kStateRow = kStates + kPiece;
  struct Inputs {
    union {
      T c[kChunk][kStateRow];
      float y[kChunk][kYRow];  // [t, p], once nobody reads C any more
    };
    T b[kChunk][kStateRow];
    T x[kChunk][kRow];
  } inputs[2];
  T taken[kChunk][kRow];     // x as far as it reaches the end of the chunk: [s, p]
  T products[kChunk][kRow];  // (C_t . B_s) exp(c_t - c_s) dt_s: [t, s]
};

// A row of a matrix for load_matrices: four matrices cover 16 rows and 16 columns from (row,
// column) on, the second one being the next down (kDown) or the next to the right.
template <bool kDown, typename T, int kStride>
__device__ __forceinline__ const T* matrix_row(const T (&from)[kChunk][kStride], int row,
                                               int column, int lane) {
  const int down = kDown ? lane / 8 % 2 : lane / 16, right = kDown ? lane / 16 : lane / 8 % 2;
  return &from[row + 8 * down + lane % 8][column + 8 * right];
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

__device__ __forceinline__ void store_word(void* to, uint32_t word) {
#if defined(ADAPTIVE_K_SIMT)
  std::memcpy(to, &word, sizeof word);
#else
  *static_cast<uint32_t*>(to) = word;
#endif
}

// Two of the matrices as the second operand of a product.
template <typename T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4], int which) {
  const uint32_t operand[2] = {b[2 * which], b[2 * which + 1]};
  mma<T>(sum, a, operand);
}

struct ChunkPlace {
  MambaSequence sequence;
  int32_t head, first_column;
  int32_t b_channel, c_channel;
};

// Starts the copies of a chunk's C, B and x; zeros beyond the sequence's tokens and the sizes.
template <typename T, int kStates>
__device__ __forceinline__ void start_copies(const MambaLayer& layer, const ChunkPlace& at,
                                             int32_t chunk,
                                             typename ChunkShared<T, kStates>::Inputs& to) {
  constexpr int kStatePieces = kStates / kPiece, kColumnPieces = kColumns / kPiece;
  constexpr int kPieces = 2 * kStatePieces + kColumnPieces;  // of a token
  const T* mixed = static_cast<const T*>(layer.mixed);
  const int32_t left = at.sequence.length - chunk * kChunk;
  const int64_t first = at.sequence.begin + int64_t{chunk} * kChunk;
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kPieces; i += kThreads) {
    const int token = i / kPieces, piece = i % kPieces;
    T* place;
    int32_t channel;
    bool valid;
    if (piece < 2 * kStatePieces) {
      const bool is_b = piece >= kStatePieces;
      const int32_t n = piece % kStatePieces * kPiece;
      place = is_b ? &to.b[token][n] : &to.c[token][n];
      channel = (is_b ? at.b_channel : at.c_channel) + n;
      valid = n < layer.state_size;
    } else {
      const int32_t p = at.first_column + (piece - 2 * kStatePieces) * kPiece;
      place = &to.x[token][p - at.first_column];
      channel = at.head * layer.head_dim + p;
      valid = p < layer.head_dim;
    }
    // A row that is not the sequence's is that of its first token, and not read.
    valid = valid && (token < left || (fault(kFaultMambaTail) && first + token < layer.tokens));
    const int64_t row = valid ? first + token : at.sequence.begin;
    copy_async(place, mixed + row * layer.channels + (valid ? channel : 0), valid);
  }
  copy_async_commit();
}

template <typename T, int kStates>
__global__ void __launch_bounds__(kThreads) mamba_chunks_kernel(MambaLayer layer) {
  using Shared = ChunkShared<T, kStates>;
  constexpr int kHalf = kStates / 2;      // columns of S that a warp has
  constexpr int kStateTiles = kHalf / 8;  // of 8 columns
  constexpr int kTokenTiles = kChunk / 8;
  auto& shared = shared_memory<Shared>();
  ChunkPlace at;
  at.sequence = sequence_at(layer, static_cast<int32_t>(blockIdx.x));
  if (at.sequence.length <= kRecurrentTokens) return;  // the whole block
  at.head = static_cast<int32_t>(blockIdx.y);
  at.first_column = static_cast<int32_t>(blockIdx.z) * kColumns;
  at.b_channel = group_channel(layer, at.head);
  at.c_channel = at.b_channel + layer.params.n_groups * layer.state_size;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, q = lane % 4;                     // of a fragment
  const int first_p = warp % 2 * 16, half = warp / 2;       // the warp's columns and share
  const int row = thread / 4, piece = thread % 4 * kPiece;  // of [32, 32] by 16-byte pieces
  const int32_t piece_column = at.first_column + piece;
  const int64_t y_stride = int64_t{layer.heads} * layer.head_dim;
  T* y = static_cast<T*>(layer.y) + at.sequence.begin * y_stride +
         int64_t{at.head} * layer.head_dim + piece_column;
  const int32_t chunks = (at.sequence.length + kChunk - 1) / kChunk;

  if (at.sequence.slot == kNoSlot) {
    for (int32_t t = row; t < at.sequence.length; t += kChunk)
      if (piece_column < layer.head_dim) store_vector(y + t * y_stride, uint4{0, 0, 0, 0});
    return;
  }

  start_copies<T, kStates>(layer, at, 0, shared.inputs[0]);

  // Element i of tile j of S: column p, n.
  const auto element = [&](int j, int i, bool& exists) -> float* {
    const int32_t p = at.first_column + first_p + g + 8 * (i / 2);
    const int32_t n = half * kHalf + 8 * j + 2 * q + i % 2;
    exists = p < layer.head_dim && n < layer.state_size;
    return layer.ssm_state +
           ((int64_t{at.sequence.slot} * layer.heads + at.head) * layer.state_size + n) *
               layer.head_dim +
           p;
  };
  float state[kStateTiles][4];
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool exists;
      const float* from = element(j, i, exists);
      state[j][i] = exists && (!at.sequence.fresh || fault(kFaultMambaFresh)) ? *from : 0.0f;
    }
  }
  const float a = layer.a[at.head], d = layer.d[at.head], dt_bias = layer.dt_bias[at.head];

  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    auto& in = shared.inputs[chunk % 2];
    if (!fault(kFaultMambaWait)) copy_async_wait<0>();
    __syncthreads();
    // Nobody reads the other buffer any more.
    if (chunk + 1 < chunks)
      start_copies<T, kStates>(layer, at, chunk + 1, shared.inputs[(chunk + 1) % 2]);

    // The lane's token: its step, and the sum of the log decays up to it.
    float dt = 0.0f, sum = 0.0f;
    if (const int32_t t = chunk * kChunk + lane; t < at.sequence.length) {
      const int64_t token = at.sequence.begin + t;
      const auto step = mamba_step<float>(
          layer.params, to_float(static_cast<const T*>(layer.dt)[token * layer.heads + at.head]),
          dt_bias, a);
      dt = step.dt;
      sum = step.log_decay;
    } else if (fault(kFaultMambaTail)) {
      dt = 1.0f;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float before = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += before;
    }
    const float whole = __shfl_sync(kAllLanes, sum, 31);

    {  // taken
      const float reach = fault(kFaultMambaStateDecay) ? dt : dt * expf(whole - sum);
      const float scale = __shfl_sync(kAllLanes, reach, row);
      float values[kPiece];
      Vector16<T>::unpack(load_vector(&in.x[row][piece]), values);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[i] *= scale;
      store_vector(&shared.taken[row][piece], pack_floats(values, T()));
    }

    {  // products: a quarter of them a warp
      const int first_t = warp % 2 * 16, first_s = warp / 2 * 16;
      float dots[2][4] = {};
      if (first_s <= first_t || fault(kFaultMambaCausal)) {  // the whole warp
#pragma unroll
        for (int k = 0; k < kStates; k += 16) {
          uint32_t c[4], b[4];
          load_matrices<false>(matrix_row<true>(in.c, first_t, k, lane), c);
          load_matrices<false>(matrix_row<false>(in.b, first_s, k, lane), b);
          multiply<T>(dots[0], c, b, 0);
          multiply<T>(dots[1], c, b, 1);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = first_t + g + 8 * (i / 2), s = first_s + 8 * j + 2 * q + i % 2;
          const float sum_t = __shfl_sync(kAllLanes, sum, t);
          const float sum_s = __shfl_sync(kAllLanes, sum, s);
          const float dt_s = __shfl_sync(kAllLanes, dt, s);
          const bool seen = s <= t || fault(kFaultMambaCausal);
          dots[j][i] = seen ? dots[j][i] * expf(sum_t - sum_s) * dt_s : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          store_word(&shared.products[first_t + g + 4 * i][first_s + 8 * j + 2 * q],
                     pack_pair<T>(dots[j][i], dots[j][i + 1]));
      }
    }

    // What the state before the chunk gives; the warp's half of the sum over n.
    float out[kTokenTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kHalf; k += 16) {
      const float(&low)[4] = state[k / 8];
      const float(&high)[4] = state[k / 8 + 1];
      const uint32_t s[4] = {pack_pair<T>(low[0], low[1]), pack_pair<T>(low[2], low[3]),
                             pack_pair<T>(high[0], high[1]), pack_pair<T>(high[2], high[3])};
#pragma unroll
      for (int t = 0; t < kChunk; t += 16) {
        uint32_t c[4];
        load_matrices<false>(matrix_row<false>(in.c, t, half * kHalf + k, lane), c);
        multiply<T>(out[t / 8], s, c, 0);
        multiply<T>(out[t / 8 + 1], s, c, 1);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float kept = expf(__shfl_sync(kAllLanes, sum, 8 * j + 2 * q + i % 2));
        out[j][i] *= fault(kFaultMambaPassState) ? 0.0f : kept;
      }
    }
    if (!fault(kFaultMambaChunkBarrier)) __syncthreads();

    {  // What the chunk's own tokens give; the warp's half of the sum over s.
      uint32_t x[4];
      load_matrices<true>(matrix_row<false>(in.x, half * 16, first_p, lane), x);
#pragma unroll
      for (int t = 0; t < kChunk; t += 16) {
        if (t < half * 16 && !fault(kFaultMambaCausal)) continue;  // tokens before all of these
        uint32_t products[4];
        load_matrices<false>(matrix_row<false>(shared.products, t, half * 16, lane), products);
        multiply<T>(out[t / 8], x, products, 0);
        multiply<T>(out[t / 8 + 1], x, products, 1);
      }
    }

    {  // The state behind the chunk.
      const float kept = expf(whole);
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[j][i] *= kept;
      }
#pragma unroll
      for (int s = 0; s < kChunk; s += 16) {
        uint32_t taken[4];
        load_matrices<true>(matrix_row<false>(shared.taken, s, first_p, lane), taken);
#pragma unroll
        for (int n = 0; n < kHalf; n += 16) {
          uint32_t b[4];
          load_matrices<true>(matrix_row<true>(in.b, s, half * kHalf + n, lane), b);
          multiply<T>(state[n / 8], taken, b, 0);
          multiply<T>(state[n / 8 + 1], taken, b, 1);
        }
      }
    }

    // The halves' sums meet in in.y.
    const auto add = [&](bool to_zero) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& value = in.y[8 * j + 2 * q + i % 2][first_p + g + 8 * (i / 2)];
          value = to_zero ? out[j][i] : value + out[j][i];
        }
      }
    };
    if (half == 1) add(true);
    if (!fault(kFaultMambaHalvesBarrier)) __syncthreads();
    if (half == 0) add(false);
    __syncthreads();
    if (chunk * kChunk + row < at.sequence.length && piece_column < layer.head_dim) {
      float x[kPiece], values[kPiece];
      Vector16<T>::unpack(load_vector(&in.x[row][piece]), x);
      Vector16<float>::unpack(load_vector(&in.y[row][piece]), values);
      Vector16<float>::unpack(load_vector(&in.y[row][piece + 4]), values + 4);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[i] += d * x[i];
      store_vector(y + (int64_t{chunk} * kChunk + row) * y_stride, pack_floats(values, T()));
    }
  }
  copy_async_wait<0>();

#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool exists;
      float* to = element(j, i, exists);
      if (exists) *to = state[j][i];
    }
  }
}

template <typename T, int kStates>
cudaError_t launch_chunks(const MambaLayer& layer, cudaStream_t stream) {
  constexpr size_t kSize = sizeof(ChunkShared<T, kStates>);
  const dim3 grid(static_cast<unsigned>(layer.sequences), static_cast<unsigned>(layer.heads),
                  static_cast<unsigned>(divide_up(layer.head_dim, kColumns)));
  if (kSize > 48 << 10)
    ADAPTIVE_K_RETURN_IF(allow_shared_memory(mamba_chunks_kernel<T, kStates>, kSize));
  return ADAPTIVE_K_LAUNCH((mamba_chunks_kernel<T, kStates>), grid, dim3(kThreads), kSize, stream,
                           layer);
}

template <typename T>
cudaError_t launch_chunks_of(const MambaLayer& layer, cudaStream_t stream) {
  if (layer.state_size <= 64) return launch_chunks<T, 64>(layer, stream);
  if (layer.state_size <= 128) return launch_chunks<T, 128>(layer, stream);
  return launch_chunks<T, 256>(layer, stream);
}

}  // namespace

cudaError_t mamba_scan_chunks(ElementType element, const MambaLayer& layer, cudaStream_t stream) {
  switch (element) {
    case ElementType::kFloat16:
      return launch_chunks_of<Half>(layer, stream);
    case ElementType::kBFloat16:
      return launch_chunks_of<BFloat16>(layer, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace adaptive_k::cuda
