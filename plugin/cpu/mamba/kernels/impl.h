// SPDX-License-Identifier: Apache-2.0
// The loops of kernels.h over the vectors that the including file defines (MambaSimd: V,
// kLanes, zero, broadcast, load, store, fma, and fma of single floats).
//
// The state is [N, P] and vectors run along P, so that nothing is ever summed across lanes: each of
// the P columns is its own sum over N in rising order, whatever the vectors' length.

#include <algorithm>

#include "cpu/mamba/kernels/kernels.h"
#include "operator/activation.h"

namespace adaptive_k::cpu {
namespace {

void convolve(const float* const* rows, const float* weight, int64_t stride, int taps,
              const float* bias, int64_t count, float* out) {
  constexpr int64_t kBlock = 64;  // channels whose sums stay in registers or the nearest cache
  float sums[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = std::min(kBlock, count - first);
    for (int64_t c = 0; c < n; ++c) sums[c] = bias[first + c];
    for (int k = 0; k < taps; ++k) {
      const float* row = rows[k] + first;
      const float* w = weight + k * stride + first;
      for (int64_t c = 0; c < n; ++c) sums[c] += w[c] * row[c];
    }
    for (int64_t c = 0; c < n; ++c) out[first + c] = adaptive_k::silu(sums[c]);
  }
}

// Columns p to p + kVectors * kLanes of the head, over all tokens: they stay in the nearest cache.
template <int kVectors>
void scan_columns(const MambaScan& s, int64_t p) {
  using V = MambaSimd::V;
  constexpr int kLanes = MambaSimd::kLanes;
  constexpr int64_t kRowsAhead = 16;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const float *b = s.b + t * s.stride, *c = s.c + t * s.stride;
    const float* x = s.x + t * s.stride + p;
    const V decay = MambaSimd::broadcast(s.decay[t * s.step_stride]);
    const V dt = MambaSimd::broadcast(s.dt[t * s.step_stride]);
    V taken[kVectors], sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      taken[v] = dt * MambaSimd::load(x + v * kLanes);
      sum[v] = MambaSimd::zero();
    }
    float* state = s.state + p;
    for (int64_t n = 0; n < s.state_size; ++n, state += s.head_dim) {
      // The processor's own prefetching ends at each page.
      for (int v = 0; v < kVectors; v += std::max(1, 16 / kLanes))
        __builtin_prefetch(state + kRowsAhead * s.head_dim + v * kLanes, 1);
      const V bn = MambaSimd::broadcast(b[n]), cn = MambaSimd::broadcast(c[n]);
      for (int v = 0; v < kVectors; ++v) {
        const V h = MambaSimd::fma(decay, MambaSimd::load(state + v * kLanes), bn * taken[v]);
        MambaSimd::store(state + v * kLanes, h);
        sum[v] = MambaSimd::fma(cn, h, sum[v]);
      }
    }
    const V d = MambaSimd::broadcast(s.d);
    float* y = s.y + t * s.y_stride + p;
    for (int v = 0; v < kVectors; ++v)
      MambaSimd::store(y + v * kLanes, MambaSimd::fma(d, MambaSimd::load(x + v * kLanes), sum[v]));
  }
}

// The columns that no vector covers, one by one.
void scan_column(const MambaScan& s, int64_t p) {
  for (int64_t t = 0; t < s.tokens; ++t) {
    const float *b = s.b + t * s.stride, *c = s.c + t * s.stride;
    const float x = s.x[t * s.stride + p];
    const float decay = s.decay[t * s.step_stride], taken = s.dt[t * s.step_stride] * x;
    float sum = 0.0f;
    float* state = s.state + p;
    for (int64_t n = 0; n < s.state_size; ++n, state += s.head_dim) {
      *state = MambaSimd::fma(decay, *state, b[n] * taken);
      sum = MambaSimd::fma(c[n], *state, sum);
    }
    s.y[t * s.y_stride + p] = MambaSimd::fma(s.d, x, sum);
  }
}

void scan(const MambaScan& s) {
  constexpr int64_t kLanes = MambaSimd::kLanes;
  int64_t p = 0;
  for (; p + 8 * kLanes <= s.head_dim; p += 8 * kLanes) scan_columns<8>(s, p);
  for (; p + 4 * kLanes <= s.head_dim; p += 4 * kLanes) scan_columns<4>(s, p);
  for (; p + kLanes <= s.head_dim; p += kLanes) scan_columns<1>(s, p);
  for (; p < s.head_dim; ++p) scan_column(s, p);
}

}  // namespace
}  // namespace adaptive_k::cpu
