// SPDX-License-Identifier: Apache-2.0
// What Mamba2's plugin has of its own (plugin.h).
//
// The states go in and come out, and whoever runs the engine binds both to one memory: then they
// are updated in place. Bound apart they come out whole as well. That a state's output aliases its
// input is not declared (IPluginV3OneBuildV2): TensorRT needs a preview feature for it, has it from
// 10.3 on only, and then may keep a copy of each state.
#pragma once

#include <NvInfer.h>

#include <vector>

#include "cuda/mamba/launcher.h"
#include "operator/mamba/shapes.h"
#include "tensorrt/types.h"

namespace adaptive_k::tensorrt {

struct MambaLayer {
  using Op = Mamba;
  using Shape = cuda::MambaShape;

  // Only tokens, sequences and slots may be unknown; they become 0.
  static Shape shape(const MambaSizes& sizes, cuda::ElementType element) {
    if (sizes.heads < 0 || sizes.head_dim < 0 || sizes.state_size < 0 || sizes.taps < 0)
      fail(
          "the heads, their width, the state's size and the convolution's taps must be "
          "known when the engine is built");
    Shape shape;
    shape.tokens = sizes.tokens < 0 ? 0 : sizes.tokens;
    shape.sequences = narrow("number of sequences", sizes.sequences);
    shape.slots = narrow("number of slots", sizes.slots);
    shape.heads = narrow("number of heads", sizes.heads);
    shape.head_dim = narrow("heads' width", sizes.head_dim);
    shape.state_size = narrow("state's size", sizes.state_size);
    shape.taps = narrow("number of taps", sizes.taps);
    shape.element = element;
    return shape;
  }

  // Tokens aside, the sizes that change from step to step: each input has its own most of them.
  static void leave_open(std::vector<Dimensions>* shapes) {
    for (const MambaInput i :
         {MambaInput::kDt, MambaInput::kSubsequenceBegins, MambaInput::kPastLens,
          MambaInput::kStateSlots, MambaInput::kConvState, MambaInput::kSsmState}) {
      Dimensions& shape = (*shapes)[static_cast<int32_t>(i)];
      if (!shape.empty()) shape[0] = -1;
    }
  }

  static void output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::IExprBuilder& builder,
                            nvinfer1::DimsExprs* outputs) {
    const nvinfer1::DimsExprs& conv_state = in[static_cast<int32_t>(MambaInput::kConvState)];
    const nvinfer1::DimsExprs& ssm_state = in[static_cast<int32_t>(MambaInput::kSsmState)];
    const nvinfer1::IDimensionExpr* heads = ssm_state.d[1];
    const nvinfer1::IDimensionExpr* head_dim = ssm_state.d[3];
    outputs[0].nbDims = 2;
    outputs[0].d[0] = in[0].d[0];
    outputs[0].d[1] =
        heads->isConstant() && head_dim->isConstant()
            ? builder.constant(heads->getConstantValue() * head_dim->getConstantValue())
            : builder.operation(nvinfer1::DimensionOperation::kPROD, *heads, *head_dim);
    outputs[1] = conv_state;
    outputs[2] = ssm_state;
  }

  static cudaError_t launch(const MambaParams& params, const Shape& shape,
                            const Addresses<MambaInput>& inputs, void* const* outputs,
                            void* workspace, cudaStream_t stream) {
    const cuda::MambaArguments arguments = {inputs, outputs[0], outputs[1],
                                            static_cast<float*>(outputs[2])};
    return cuda::launch(params, shape, arguments, workspace, stream);
  }
};

}  // namespace adaptive_k::tensorrt
