// SPDX-License-Identifier: Apache-2.0
// What AdaptiveKMoe's plugin has of its own (plugin.h).
#pragma once

#include <NvInfer.h>

#include <vector>

#include "cuda/moe/launcher.h"
#include "operator/moe/shapes.h"
#include "tensorrt/types.h"

namespace adaptive_k::tensorrt {

struct MoeLayer {
  using Op = Moe;
  using Shape = cuda::MoeShape;

  // Only tokens, policies and choices may be unknown; they become 0.
  static Shape shape(const MoeSizes& sizes, cuda::ElementType element) {
    if (sizes.hidden < 0 || sizes.intermediate < 0 || sizes.experts < 0)
      fail(
          "the hidden size, the intermediate size and the number of experts must be known when "
          "the engine is built");
    Shape shape;
    shape.tokens = sizes.tokens < 0 ? 0 : sizes.tokens;
    shape.hidden = narrow("hidden size", sizes.hidden);
    shape.intermediate = narrow("intermediate size", sizes.intermediate);
    shape.experts = narrow("number of experts", sizes.experts);
    shape.local_experts = narrow("number of local experts", sizes.local_experts);
    shape.policies = narrow("number of policies", sizes.policies);
    shape.choices = narrow("number of choices", sizes.choices);
    shape.element = element;
    shape.group_size = narrow("group size", sizes.group_size);
    return shape;
  }

  static void leave_open(std::vector<Dimensions>*) {}

  static void output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder&,
                            nvinfer1::DimsExprs* outputs) {
    outputs[0] = in[0];
    for (const auto per_token : {MoeOutput::kK, MoeOutput::kEntropy}) {
      outputs[static_cast<int32_t>(per_token)].nbDims = 1;
      outputs[static_cast<int32_t>(per_token)].d[0] = in[0].d[0];
    }
    auto& load = outputs[static_cast<int32_t>(MoeOutput::kExpertLoad)];
    load.nbDims = 1;
    load.d[0] = in[static_cast<int32_t>(MoeInput::kRouterLogits)].d[1];
  }

  static cudaError_t launch(const MoeParams& params, const Shape& shape,
                            const Addresses<MoeInput>& inputs, void* const* outputs,
                            void* workspace, cudaStream_t stream) {
    const cuda::MoeArguments arguments = {inputs, outputs[0], static_cast<int32_t*>(outputs[1]),
                                          static_cast<float*>(outputs[2]),
                                          static_cast<int32_t*>(outputs[3])};
    return cuda::launch(params, shape, arguments, workspace, stream);
  }
};

}  // namespace adaptive_k::tensorrt
