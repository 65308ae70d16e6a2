// SPDX-License-Identifier: Apache-2.0
// Mamba2's loops, one set for each instruction set, as the instruction set in use asks for.
#pragma once

#include <cstdint>

namespace adaptive_k::cpu {

// One head of one sequence over its tokens. Row t of x, B, C and y is t strides further.
struct MambaScan {
  int64_t tokens, head_dim, state_size;
  const float *x, *b, *c;  // [tokens, P], [tokens, N], [tokens, N]
  int64_t stride;          // of x, b and c
  const float *decay, *dt;
  int64_t step_stride;  // of decay and dt
  float d;
  float* state;  // [N, P]
  float* y;      // [tokens, P]
  int64_t y_stride;
};

struct MambaKernels {
  const char* name;

  // out[c] = silu(bias[c] + sum over k of weight[k * stride + c] * rows[k][c]), c < count.
  void (*convolve)(const float* const* rows, const float* weight, int64_t stride, int taps,
                   const float* bias, int64_t count, float* out);

  void (*scan)(const MambaScan& scan);
};

// Those of the instruction set in use (machine.h); amx has avx512's.
const MambaKernels& mamba_kernels();

extern const MambaKernels kPortableMambaKernels;
#if defined(ADAPTIVE_K_X86)
extern const MambaKernels kAvx2MambaKernels;
extern const MambaKernels kAvx512MambaKernels;
#endif

}  // namespace adaptive_k::cpu
