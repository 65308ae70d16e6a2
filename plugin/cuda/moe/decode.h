// SPDX-License-Identifier: Apache-2.0
// The expert products for few tokens, which stream the chosen experts' weights and nothing else.
#pragma once

#include "cuda/moe/projection.h"

namespace adaptive_k::cuda {

// The result of a down-projection is float32.
cudaError_t decode(const Projection& projection, cudaStream_t stream);

// The same for 16-bit activations with quantised weights; decode() calls it.
cudaError_t decode_integers(const Projection& projection, cudaStream_t stream);

}  // namespace adaptive_k::cuda
