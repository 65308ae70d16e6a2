// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "cuda/moe/decode.h"
#include "cuda/moe/grouped_gemm.h"
#include "cuda/moe/launcher.h"
#include "cuda/moe/mixed.h"
#include "cuda/moe/plan.h"
#include "cuda/moe/route.h"
#include "cuda/moe/route_and_plan.h"
#include "cuda/moe/rows.h"
#include "cuda/moe/workspace.h"
#include "cuda/numeric.h"
#include "operator/table.h"

namespace adaptive_k::cuda {
namespace {

// Up to this many tokens always decode.
constexpr int64_t kDecodeTokens = 8;
// Never more than this many tokens decode, however many experts share them.
constexpr int64_t kMostDecodeTokens = 128;
// In between, as long as an expert has on average at most this many rows.
constexpr int64_t kDecodeRowsPerExpert = 4;

bool decodes(int64_t tokens, int32_t capacity, int32_t experts) {
  return tokens <= kDecodeTokens ||
         (tokens <= kMostDecodeTokens && tokens * capacity <= kDecodeRowsPerExpert * experts);
}

bool can_prefill(const MoeParams& params, const MoeShape& shape) {
  return is_quantised(params.weight_format) ? shape.element != ElementType::kFloat32
                                            : grouped_gemm_supports(shape.element);
}

// A sentence that lives until the thread's next one.
const char* keep(std::string sentence) {
  static thread_local std::string kept;
  kept = std::move(sentence);
  return kept.c_str();
}

bool is_one_of(int32_t value, int32_t last) { return value >= 0 && value <= last; }

WeightFormat format_of(ElementType element) {
  return element == ElementType::kFloat16    ? WeightFormat::kFloat16
         : element == ElementType::kBFloat16 ? WeightFormat::kBFloat16
                                             : WeightFormat::kFloat32;
}

}  // namespace

const char* check(const MoeParams& params, const MoeShape& s) {
  if (s.experts < 1) return "there must be at least one expert";
  if (s.experts > kMaxExpertsOnGpu) return "there may be at most 512 experts";
  if (const char* wrong = check_attributes(params, s.experts)) return wrong;
  if (largest_k(params, s.experts) > kMaxK) return "max_k must be at most 32 on CUDA devices";
  if (s.policies < 1) return "policy_kind needs at least one row";
  if (s.choices < 1) return "k_values needs at least one column";
  if (s.tokens < 0) return "the number of tokens must not be negative";
  if (s.tokens * largest_k(params, s.experts) >= int64_t{1} << 31)
    return "tokens times max_k must stay below 2^31";
  if (s.path == Path::kRoute) return nullptr;
  const ExpertRange range = expert_range(params, s.experts, s.local_experts);
  if (range.count < 1 || range.count > s.experts - range.first)
    return "first_expert and the experts whose weights are given must be a range of the experts";
  if (s.hidden < 1 || s.intermediate < 1) return "hidden and intermediate size must be positive";
  if (!is_one_of(static_cast<int32_t>(s.element), 2)) return "the element type is unknown";
  const WeightFormat format = params.weight_format;
  if (!is_one_of(static_cast<int32_t>(format), words_of(format).count - 1) || !on_gpus(format))
    return "the weight format is unknown";
  if (params.activation_format != ActivationFormat::kAsHiddenStates)
    return "activation_format must be empty: only CPUs round activations to int8";
  if (!is_quantised(format) && stored_format(format, format_of(s.element)) != format_of(s.element))
    return "weights that are not quantised must be of hidden_states' type";
  if (!is_one_of(static_cast<int32_t>(s.path), 2)) return "the path is unknown";
  if (s.hidden % 8 != 0 || s.intermediate % 8 != 0)
    return "hidden and intermediate size must be multiples of 8, for 16-byte loads";
  if (s.hidden % row_multiple(format) != 0 || s.intermediate % row_multiple(format) != 0)
    return keep("hidden and intermediate size must be multiples of " +
                std::to_string(row_multiple(format)) + " for " + spelling(format) + " weights");
  if (is_quantised(format) && (s.group_size < 0 || s.group_size % kGroupMultiple != 0))
    return "group_size must be 0 or a multiple of 32";
  if (is_quantised(format) && s.group_size > 0 &&
      (s.hidden % s.group_size != 0 || s.intermediate % s.group_size != 0))
    return "group_size must divide the hidden and the intermediate size";
  // The kernels divide by a group's size with a multiplication that is exact up to there.
  if (is_quantised(format) && std::max(s.hidden, s.intermediate) > 1 << 19)
    return "hidden and intermediate size must be at most 524288 for quantised weights";
  if (s.path == Path::kPrefill && !can_prefill(params, s))
    return "the prefill path takes float16 and bfloat16 only";
  // The decode kernels count the 16-byte pieces of activation rows in 32 bits.
  const int64_t numbers =
      std::max(s.tokens * s.hidden, s.tokens * largest_k(params, s.experts) * s.intermediate);
  const int64_t pieces = numbers * element_bytes(s.element) / 16;
  if (choose_path(params, s) == Path::kDecode && pieces >= int64_t{1} << 32)
    return "the activations are too large for the decode path: use fewer tokens a launch";
  return nullptr;
}

Path choose_path(const MoeParams& params, const MoeShape& s) {
  if (s.path != Path::kAuto) return s.path;
  if (!can_prefill(params, s)) return Path::kDecode;
  return decodes(s.tokens, largest_k(params, s.experts), s.experts) ? Path::kDecode
                                                                    : Path::kPrefill;
}

Workspace lay_out(const MoeParams& params, const MoeShape& s, Path path) {
  const int64_t rows = s.tokens * largest_k(params, s.experts);
  const int64_t element = element_bytes(s.element);
  const int64_t chunks = divide_up(s.tokens, kPlanTokens);
  Workspace w = {};
  const auto reserve = [&w](int64_t bytes) {
    const size_t at = w.size;
    w.size += static_cast<size_t>(divide_up(bytes, 256) * 256);
    return at;
  };
  w.experts = reserve(rows * 4);
  w.weights = reserve(rows * 4);
  w.read = reserve(s.experts);
  w.chunk_counts = reserve((chunks + 1) * s.experts * 4);
  w.offsets = reserve((s.experts + int64_t{1}) * 4);
  w.active = reserve(s.experts * int64_t{4});
  w.num_active = reserve(4);
  w.row_token = reserve(rows * 4);
  w.token_rows = reserve(rows * 4);
  if (path == Path::kRoute) return w;
  w.h = reserve(rows * s.intermediate * element);
  if (path == Path::kDecode) {
    w.y = reserve(rows * s.hidden * 4);
  } else if (is_quantised(params.weight_format)) {
    w.y = reserve(rows * s.hidden * element);
    w.tiles = reserve(mixed_max_tiles(rows, s.experts) * static_cast<int64_t>(sizeof(RowTile)));
    w.num_tiles = reserve(4);
  } else {
    w.x = w.y = reserve(rows * s.hidden * element);
    if (is_gated(params.activation)) w.u = reserve(rows * s.intermediate * element * 2);
    w.gemm = reserve(static_cast<int64_t>(grouped_gemm_workspace(s.experts)));
  }
  return w;
}

size_t workspace_size(const MoeParams& params, const MoeShape& s) {
  // A call with fewer tokens may take the other path, so room for both: decode's for the most
  // tokens that may take it.
  if (s.path == Path::kRoute) return lay_out(params, s, s.path).size;
  size_t size = 0;
  if (choose_path(params, s) == Path::kPrefill) size = lay_out(params, s, Path::kPrefill).size;
  if (s.path != Path::kPrefill) {
    MoeShape few = s;
    const int32_t capacity = largest_k(params, s.experts);
    if (s.path == Path::kAuto && can_prefill(params, s))
      while (few.tokens > 0 && !decodes(few.tokens, capacity, s.experts))
        few.tokens = few.tokens > kMostDecodeTokens ? kMostDecodeTokens : few.tokens - 1;
    const size_t decode = lay_out(params, few, Path::kDecode).size;
    size = size > decode ? size : decode;
  }
  return size;
}

cudaError_t launch(const MoeParams& params, const MoeShape& s, const MoeArguments& a,
                   void* workspace, cudaStream_t stream) {
  if (check(params, s) != nullptr) return cudaErrorInvalidValue;
  if (s.tokens == 0) return cudaSuccess;
  const bool quantised = is_quantised(params.weight_format);
  for (int32_t i = 0; i < kNumInputs<Moe>; ++i) {
    const auto input = static_cast<MoeInput>(i);
    const bool product = input == MoeInput::kHiddenStates || input == MoeInput::kUp ||
                         input == MoeInput::kDown ||
                         Moe::kInputs[i].presence == Presence::kIfQuantised;
    if (product && s.path == Path::kRoute) continue;
    const bool needed = Moe::kInputs[i].presence == Presence::kAlways ||
                        (Moe::kInputs[i].presence == Presence::kIfQuantised && quantised);
    if (needed && a.inputs[input] == nullptr && (input != MoeInput::kThresholds || s.choices > 1))
      return cudaErrorInvalidValue;
  }
  if (a.output == nullptr && s.path != Path::kRoute) return cudaErrorInvalidValue;
  if (a.k == nullptr || a.entropy == nullptr || workspace == nullptr) return cudaErrorInvalidValue;

  const Path path = choose_path(params, s);
  const Workspace w = lay_out(params, s, path);
  char* const base = static_cast<char*>(workspace);
  const auto integers = [base](size_t at) { return reinterpret_cast<int32_t*>(base + at); };
  const auto floats = [base](size_t at) { return reinterpret_cast<float*>(base + at); };
  const int32_t capacity = largest_k(params, s.experts);

  RouteArguments r = {};
  r.params = params;
  r.tokens = s.tokens;
  r.num_experts = s.experts;
  r.num_policies = s.policies;
  r.num_choices = s.choices;
  r.capacity = capacity;
  r.logits = a.inputs.floats(MoeInput::kRouterLogits);
  r.policy_index = a.inputs.integers(MoeInput::kPolicyIndex);
  r.policy_kind = a.inputs.integers(MoeInput::kPolicyKind);
  r.thresholds = a.inputs.floats(MoeInput::kThresholds);
  r.k_values = a.inputs.integers(MoeInput::kKValues);
  r.correction_bias = a.inputs.floats(MoeInput::kCorrectionBias);
  r.expert_norms = a.inputs.floats(MoeInput::kExpertNorms);
  r.k = a.k;
  r.entropy = a.entropy;
  r.experts = integers(w.experts);
  r.weights = floats(w.weights);
  r.read = reinterpret_cast<uint8_t*>(base + w.read);

  PlanArguments p = {};
  p.tokens = s.tokens;
  p.num_experts = s.experts;
  p.capacity = capacity;
  p.range = path == Path::kRoute ? ExpertRange{0, s.experts}
                                 : expert_range(params, s.experts, s.local_experts);
  p.k = a.k;
  p.experts = r.experts;
  p.chunk_counts = integers(w.chunk_counts);
  p.offsets = integers(w.offsets);
  p.active = integers(w.active);
  p.num_active = integers(w.num_active);
  p.expert_load = a.expert_load;
  p.row_token = integers(w.row_token);
  p.token_rows = integers(w.token_rows);
  ADAPTIVE_K_RETURN_IF(route_and_plan(r, p, stream));
  if (path == Path::kRoute) return cudaSuccess;

  // From here on experts are counted from the first of the range. Rows are not.
  const int64_t max_rows = s.tokens * capacity;
  const int32_t* const offsets = p.offsets + p.range.first;
  if (path == Path::kDecode || quantised) {
    const PlannedRows rows = {offsets,     p.active,      p.num_active,
                              p.row_token, p.range.count, max_rows};
    Projection up = {};
    up.up = true;
    up.element = s.element;
    up.format = quantised ? params.weight_format : WeightFormat::kAsHiddenStates;
    up.activation = params.activation;
    up.rows = rows;
    up.k = s.hidden;
    up.neurons = s.intermediate;
    up.group_size = s.group_size > 0 ? s.group_size : up.k;
    up.x = a.inputs[MoeInput::kHiddenStates];
    up.w = a.inputs[MoeInput::kUp];
    up.scales = a.inputs[MoeInput::kUpScales];
    up.out = base + w.h;
    Projection down = up;
    down.up = false;
    down.k = s.intermediate;
    down.neurons = s.hidden;
    down.group_size = s.group_size > 0 ? s.group_size : down.k;
    down.x = up.out;
    down.w = a.inputs[MoeInput::kDown];
    down.scales = a.inputs[MoeInput::kDownScales];
    down.out = base + w.y;
    if (path == Path::kDecode) {
      ADAPTIVE_K_RETURN_IF(decode(up, stream));
      ADAPTIVE_K_RETURN_IF(decode(down, stream));
    } else {
      auto* tiles = reinterpret_cast<RowTile*>(base + w.tiles);
      int32_t* num_tiles = integers(w.num_tiles);
      ADAPTIVE_K_RETURN_IF(mixed_tiles(rows, tiles, num_tiles, stream));
      ADAPTIVE_K_RETURN_IF(mixed(up, tiles, num_tiles, stream));
      ADAPTIVE_K_RETURN_IF(mixed(down, tiles, num_tiles, stream));
    }
  } else {
    const RowRange rows = {offsets, offsets + p.range.count};
    ADAPTIVE_K_RETURN_IF(gather_rows(s.element, a.inputs[MoeInput::kHiddenStates], p.row_token,
                                     rows, max_rows, s.hidden, base + w.x, stream));
    GroupedGemm gemm = {};
    gemm.element = s.element;
    gemm.experts = p.range.count;
    gemm.all_experts = s.experts;
    gemm.n = s.intermediate * (is_gated(params.activation) ? 2 : 1);
    gemm.k = s.hidden;
    gemm.tokens = s.tokens;
    gemm.max_rows = max_rows;
    gemm.offsets = offsets;
    gemm.a = base + w.x;
    gemm.b = a.inputs[MoeInput::kUp];
    // A gated activation needs two columns that lie I apart, which no tile has both of.
    const bool gated = is_gated(params.activation);
    gemm.c = base + (gated ? w.u : w.h);
    gemm.activated = !gated;
    gemm.activation = params.activation;
    ADAPTIVE_K_RETURN_IF(grouped_gemm(gemm, base + w.gemm, stream));
    if (gated)
      ADAPTIVE_K_RETURN_IF(activate_rows(s.element, params.activation, base + w.u, rows, max_rows,
                                         s.intermediate, base + w.h, stream));
    gemm.activated = false;
    gemm.n = s.hidden;
    gemm.k = s.intermediate;
    gemm.a = base + w.h;
    gemm.b = a.inputs[MoeInput::kDown];
    gemm.c = base + w.y;
    ADAPTIVE_K_RETURN_IF(grouped_gemm(gemm, base + w.gemm, stream));
  }
  return combine_rows(s.element, path == Path::kDecode, base + w.y, p.token_rows, r.weights, a.k,
                      s.tokens, capacity, s.hidden, a.output, stream);
}

}  // namespace adaptive_k::cuda
