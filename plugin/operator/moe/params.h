// SPDX-License-Identifier: Apache-2.0
// The attributes of AdaptiveKMoe, with the names that every face of the operator uses for them.
#pragma once

#include <cstdint>
#include <cstring>

// Functions that CUDA kernels share with the host carry this mark. They are static because the CPU
// files that include them are compiled for different instruction sets: the copy of one must never
// serve another.
#if defined(__CUDACC__)
#define ADAPTIVE_K_HD __host__ __device__ static inline
#else
#define ADAPTIVE_K_HD static inline
#endif

namespace adaptive_k {

// What an expert does between its two projections. In the gated ones, the first I rows of gate_up
// are the gate and the other I rows are the up-projection.
enum class Activation : int32_t {
  kSwiglu,    // silu(gate) * up
  kGeglu,     // gelu(gate) * up, gelu by erf
  kSilu,      // silu(up)
  kGelu,      // gelu(up), by erf
  kGeluTanh,  // gelu(up), by the tanh approximation
  kRelu,      // max(up, 0)
  kRelu2,     // max(up, 0)^2
};

enum class Scoring : int32_t { kSoftmax, kSigmoid };

// How a row of K weights is stored. int8 and int4 stand for value * scale, with one scale for each
// group of neighbours along the row, or for the whole row; two int4 share a byte, the one with the
// even index in the low half, both in two's complement.
enum class WeightFormat : int32_t { kFloat32, kBFloat16, kInt8, kInt4 };

// What a policy row decides k by.
enum class PolicyKind : int32_t {
  kEntropy = 0,
  kTopP = 1,
  kRatio = 2,
  kContribution = 3,
  kSharedPrice = 4,    // sharing.h; the parameter is the price of reading an expert
  kSharedExperts = 5,  // sharing.h; the parameter is how many experts the row adds to a step
};

// Whether a row's tokens choose among what the whole step reads.
ADAPTIVE_K_HD bool is_sharing(int32_t kind) {
  return kind == static_cast<int32_t>(PolicyKind::kSharedPrice) ||
         kind == static_cast<int32_t>(PolicyKind::kSharedExperts);
}

// The largest k when max_k is left at 0 (and the model has that many experts).
constexpr int32_t kDefaultMaxK = 32;
// The largest max_k.
constexpr int32_t kMaxKLimit = 1024;

struct MoeParams {
  Activation activation = Activation::kSwiglu;
  Scoring scoring = Scoring::kSoftmax;
  WeightFormat weight_format = WeightFormat::kFloat32;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1.0f;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  int32_t max_k = 0;  // 0: min(num_experts, kDefaultMaxK)
};

ADAPTIVE_K_HD constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGeglu;
}

ADAPTIVE_K_HD constexpr bool is_quantised(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kInt4;
}

ADAPTIVE_K_HD constexpr int32_t bits_of(WeightFormat format) {
  return format == WeightFormat::kFloat32    ? 32
         : format == WeightFormat::kBFloat16 ? 16
         : format == WeightFormat::kInt8     ? 8
                                             : 4;
}

// The number of experts that a token may select at most: max_k, capped by what the groups leave.
ADAPTIVE_K_HD int32_t largest_k(const MoeParams& params, int32_t num_experts) {
  int32_t limit = params.max_k > 0 ? params.max_k : kDefaultMaxK;
  const int32_t selectable =
      params.n_group > 1 ? num_experts / params.n_group * params.topk_group : num_experts;
  return limit < selectable ? limit : selectable;
}

// The spelling of each attribute value. Parsing returns false for an unknown word, so that every
// face can report it in its own kind of error; the lists are for those messages.
struct AttributeWord {
  const char* word;
  int32_t value;
};

constexpr AttributeWord kActivationWords[] = {
    {"swiglu", static_cast<int32_t>(Activation::kSwiglu)},
    {"geglu", static_cast<int32_t>(Activation::kGeglu)},
    {"silu", static_cast<int32_t>(Activation::kSilu)},
    {"gelu", static_cast<int32_t>(Activation::kGelu)},
    {"gelu_tanh", static_cast<int32_t>(Activation::kGeluTanh)},
    {"relu", static_cast<int32_t>(Activation::kRelu)},
    {"relu2", static_cast<int32_t>(Activation::kRelu2)},
};
constexpr AttributeWord kScoringWords[] = {
    {"softmax", static_cast<int32_t>(Scoring::kSoftmax)},
    {"sigmoid", static_cast<int32_t>(Scoring::kSigmoid)},
};
constexpr AttributeWord kWeightFormatWords[] = {
    {"float32", static_cast<int32_t>(WeightFormat::kFloat32)},
    {"bfloat16", static_cast<int32_t>(WeightFormat::kBFloat16)},
    {"int8", static_cast<int32_t>(WeightFormat::kInt8)},
    {"int4", static_cast<int32_t>(WeightFormat::kInt4)},
};
constexpr const char* kActivationChoices = "swiglu, geglu, silu, gelu, gelu_tanh, relu, relu2";
constexpr const char* kScoringChoices = "softmax, sigmoid";
constexpr const char* kWeightFormatChoices = "float32, bfloat16, int8, int4";

template <typename Enum, size_t N>
bool parse_word(const AttributeWord (&words)[N], const char* word, Enum* value) {
  for (const AttributeWord& entry : words) {
    if (std::strcmp(entry.word, word) == 0) {
      *value = static_cast<Enum>(entry.value);
      return true;
    }
  }
  return false;
}

inline bool parse(const char* word, Activation* value) {
  return parse_word(kActivationWords, word, value);
}
inline bool parse(const char* word, Scoring* value) {
  return parse_word(kScoringWords, word, value);
}
inline bool parse(const char* word, WeightFormat* value) {
  return parse_word(kWeightFormatWords, word, value);
}

// Returns nullptr when the numeric attributes fit a model of num_experts experts (0: not known
// yet), else the sentence that says what is wrong.
inline const char* check_attributes(const MoeParams& params, int32_t num_experts) {
  if (params.max_k < 0) return "max_k must be 0 (the default) or positive";
  if (params.max_k > kMaxKLimit) return "max_k must be at most 1024";
  if (params.n_group < 1) return "n_group must be at least 1";
  if (params.topk_group < 1 || params.topk_group > params.n_group)
    return "topk_group must be between 1 and n_group";
  if (num_experts > 0 && num_experts % params.n_group != 0)
    return "n_group must divide the number of experts";
  return nullptr;
}

}  // namespace adaptive_k
