// SPDX-License-Identifier: Apache-2.0
// Mamba2's fields, tensors and shapes as TensorRT has them. All functions throw
// std::invalid_argument with a sentence.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/mamba/launcher.h"
#include "operator/mamba/params.h"
#include "operator/mamba/shapes.h"

namespace adaptive_k::tensorrt {

constexpr int32_t kNumMambaInputs = cpu::kMambaInputs;

enum MambaOutput : int32_t { kY, kPresentConvState, kPresentSsmState, kNumMambaOutputs };

// The input that an output is the updated form of.
constexpr int32_t kConvStateInput = static_cast<int32_t>(cpu::MambaInput::kConvState);
constexpr int32_t kSsmStateInput = static_cast<int32_t>(cpu::MambaInput::kSsmState);

// One line of name=value pairs that holds exactly what distinguishes two plugins.
std::string describe(const MambaParams& params);

// Absent fields keep their defaults.
MambaParams read_mamba_fields(const nvinfer1::PluginFieldCollection* collection);

// The names and types that a creator announces, with no data.
const nvinfer1::PluginFieldCollection* mamba_field_names();

// Attributes as fields that read_mamba_fields() takes back. Owns what the fields point to.
class MambaFieldList {
 public:
  explicit MambaFieldList(const MambaParams& params);
  MambaFieldList(const MambaFieldList&) = delete;
  MambaFieldList& operator=(const MambaFieldList&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  MambaParams params_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

void check_mamba_counts(int32_t num_inputs, int32_t num_outputs);

// The type that a tensor (inputs first, then outputs) must have, given that of conv_input.
nvinfer1::DataType expected_mamba_type(int32_t pos, nvinfer1::DataType conv_input);

void check_mamba_types(const nvinfer1::DataType* types);

// The shape for the kernels. Only tokens, sequences and slots may be unknown; they become 0.
cuda::MambaShape make_mamba_shape(const MambaParams& params,
                                  const std::vector<std::vector<int64_t>>& shapes,
                                  nvinfer1::DataType conv_input);

}  // namespace adaptive_k::tensorrt
