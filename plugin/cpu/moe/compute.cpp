// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/compute.h"

#include <algorithm>
#include <vector>

#include "cpu/moe/kernels/kernels.h"
#include "cpu/moe/plan.h"
#include "cpu/moe/products.h"
#include "cpu/scratch.h"
#include "operator/moe/routing.h"
#include "operator/moe/sharing.h"

namespace adaptive_k::cpu {
namespace {

// Work below this many weight bytes (each counted once for every kRowsPerRead token rows) stays on
// the calling thread: handing it out would cost more than it saves.
constexpr int64_t kSerialBytes = 192 << 10;
constexpr int64_t kRowsPerRead = 16;
// Tokens are taken in chunks whose intermediate results stay below about this many floats.
constexpr int64_t kChunkFloats = 64 << 20;

// One call of the operator on one chunk of tokens.
class Layer {
 public:
  Layer(const MoeParams& params, WeightFormat format, const MoeArguments& args, Scratch& scratch)
      : params_(params),
        hidden_(args.sizes.hidden),
        intermediate_(args.sizes.intermediate),
        kernels_(kernels(format, params.activation_format)),
        scratch_(scratch),
        plan_(scratch.plan),
        gated_(is_gated(params.activation)),
        up_(format, args.inputs[MoeInput::kUp], args.inputs.floats(MoeInput::kUpScales),
            (gated_ ? 2 : 1) * intermediate_, hidden_, args.sizes.group_size),
        down_(format, args.inputs[MoeInput::kDown], args.inputs.floats(MoeInput::kDownScales),
              hidden_, intermediate_, args.sizes.group_size),
        padded_intermediate_(round_up(intermediate_, kernels_.lanes)) {}

  void run(const float* hidden_states, float* output) {
    if (plan_.num_rows() == 0) {  // tokens that share, or for which none of these experts runs
      std::fill_n(output, plan_.num_tokens * hidden_, 0.0f);
      return;
    }
    const int64_t expert_bytes = up_.rows * up_.row_bytes() + down_.rows * down_.row_bytes();
    serial_ =
        expert_bytes * (plan_.num_experts_used + plan_.num_rows() / kRowsPerRead) < kSerialBytes;
    gather(hidden_states);
    project_up();
    pack_hidden();
    project_down(output);
  }

 private:
  // Packs the plan's rows for the matrix; row(i) is the i-th.
  template <typename Row>
  void pack(const Matrix& matrix, FloatBuffer& buffer, std::vector<Tile>* tiles, const Row& row) {
    pack_rows(kernels_, matrix, plan_.tiles, plan_.num_rows(), serial_, row, buffer, tiles);
  }

  void gather(const float* hidden_states) {
    x_tiles_ = &scratch_.x_tiles;
    h_tiles_ = &scratch_.h_tiles;
    pack(up_, scratch_.x, x_tiles_,
         [&](int64_t row) { return hidden_states + plan_.row_token[row] * hidden_; });
    const int64_t h_bytes = kernels_.rounds_to_int8
                                ? intermediate_ * static_cast<int64_t>(sizeof(float))
                                : packed_row_bytes(kernels_, down_);
    h_ = reserve_bytes(scratch_.h, plan_.num_rows() * h_bytes);
    h_tiles_->resize(plan_.tiles.size());
    for (size_t i = 0; i < plan_.tiles.size(); ++i)
      (*h_tiles_)[i] = {h_ + plan_.tiles[i].first_row * h_bytes, plan_.tiles[i].rows};
  }

  // Hidden values that have to be whole before they are packed.
  void pack_hidden() {
    if (!kernels_.rounds_to_int8) return;
    const auto* rows = reinterpret_cast<const float*>(h_);
    pack(down_, scratch_.packed_h, h_tiles_,
         [&](int64_t row) { return rows + row * intermediate_; });
  }

  // c [rows of the block, weight rows] = products of the block's rows of `tiles`.
  void multiply(const Plan::Block& block, const std::vector<Tile>& tiles, const WeightRows& weights,
                float* c) const {
    kernels_.multiply(tiles.data() + block.first_tile, block.num_tiles, weights.weights(),
                      weights.K(), second_level_cache_bytes(), c);
  }

  // A task computes some panels of neurons for one block.
  void project_up() const {
    const int neurons = gated_ ? kPanelRows / 2 : kPanelRows;
    const int64_t panels = divide_up(intermediate_, neurons);
    const int64_t num_blocks = static_cast<int64_t>(plan_.blocks.size());
    const int64_t per_task =
        units_per_task(num_blocks * panels, kPanelRows * up_.row_bytes(), kMaxPanels);
    const int64_t strips = divide_up(panels, per_task);
    parallel_for(num_blocks * strips, 1, serial_, [&](int64_t i) {
      // Blocks of one expert take a strip one after the other: it is still in some cache then.
      const Plan::Block& block = plan_.blocks[i / strips];
      const int64_t begin = i % strips * per_task, end = std::min(begin + per_task, panels);
      WeightRows weights(up_, block.expert);
      for (int64_t p = begin; p < end; ++p) {
        weights.add(p * neurons, neurons, intermediate_);
        if (gated_) weights.add(intermediate_ + p * neurons, neurons, 2 * intermediate_);
      }
      if (end < panels || i / strips + 1 < num_blocks) {
        const int32_t expert = plan_.blocks[end < panels ? i / strips : i / strips + 1].expert;
        const int64_t next = end < panels ? end * neurons : 0;
        weights.then(expert, next);
        weights.then(expert, gated_ ? intermediate_ + next : next + kGroupRows);
      }
      float* c = thread_floats(block.num_rows * weights.size());
      multiply(block, *x_tiles_, weights, c);
      for (int t = 0; t < block.num_tiles; ++t) {
        const Tile& tile = (*h_tiles_)[block.first_tile + t];
        for (int64_t p = begin; p < end; ++p)
          kernels_.activate(params_.activation, c + (p - begin) * kPanelRows, weights.size(),
                            tile.rows, p * neurons, intermediate_, padded_intermediate_,
                            const_cast<void*>(tile.x));
        c += tile.rows * weights.size();
      }
    });
  }

  // A task takes a strip of the output's columns through all experts, so that it can add up each
  // token's experts itself, in the order of their rank.
  void project_down(float* output) const {
    const int64_t units = divide_up(hidden_, kGroupRows);
    const int64_t columns =
        kGroupRows * units_per_task(units, plan_.num_experts_used * kGroupRows * down_.row_bytes(),
                                    kMaxPanels * kPanelRows / kGroupRows);
    parallel_for(divide_up(hidden_, columns), 1, serial_, [&](int64_t i) {
      const int64_t first = i * columns;
      const int count = static_cast<int>(std::min(columns, hidden_ - first));
      const int64_t width = round_up(count, kGroupRows);
      float* c = thread_floats(plan_.num_rows() * width);
      for (size_t b = 0; b < plan_.blocks.size(); ++b) {
        const Plan::Block& block = plan_.blocks[b];
        WeightRows weights(down_, block.expert);
        weights.add(first, width, hidden_);
        const bool last = b + 1 == plan_.blocks.size();
        for (int64_t row = last ? first + columns : first, n = 0; n < kNextGroups;
             ++n, row += kGroupRows)
          weights.then(plan_.blocks[last ? 0 : b + 1].expert, row);
        multiply(block, *h_tiles_, weights, c + block.first_row * width);
      }
      for (int64_t t = 0; t < plan_.num_tokens; ++t) {
        const int64_t begin = plan_.token_begin[t];
        const int k = static_cast<int>(plan_.token_begin[t + 1] - begin);
        const float* y[kMaxKAttribute];
        for (int j = 0; j < k; ++j) y[j] = c + plan_.token_rows[begin + j] * width;
        kernels_.combine(y, plan_.token_weights.data() + begin, k, count,
                         output + t * hidden_ + first);
      }
    });
  }

  const MoeParams& params_;
  const int64_t hidden_, intermediate_;
  const Kernels& kernels_;
  Scratch& scratch_;
  const Plan& plan_;
  const bool gated_;
  const Matrix up_, down_;
  const int64_t padded_intermediate_;
  bool serial_ = false;
  std::vector<Tile>* x_tiles_ = nullptr;
  std::vector<Tile>* h_tiles_ = nullptr;
  char* h_ = nullptr;
};

// The policy tables of a call, in the types of the rules.
struct Policies {
  const int32_t* index;
  const int32_t* kind;
  const float* thresholds;
  const int32_t* k_values;
  int32_t count, choices;

  explicit Policies(const MoeArguments& args)
      : index(args.inputs.integers(MoeInput::kPolicyIndex)),
        kind(args.inputs.integers(MoeInput::kPolicyKind)),
        thresholds(args.inputs.floats(MoeInput::kThresholds)),
        k_values(args.inputs.integers(MoeInput::kKValues)),
        count(static_cast<int32_t>(args.sizes.policies)),
        choices(static_cast<int32_t>(args.sizes.choices)) {}

  PolicyRow row(int32_t policy) const {
    return policy_row(policy, kind, thresholds, k_values, count, choices);
  }
};

// Routes one token, among the experts that `read` marks if there is such a list.
void route_one(const MoeParams& params, const MoeArguments& args, const Policies& policies,
               int64_t token, const uint8_t* read, int32_t* k, float* entropy, int32_t* experts,
               float* weights) {
  static thread_local RoutingBuffers* buffers = nullptr;
  if (buffers == nullptr) buffers = new RoutingBuffers;
  const auto num_experts = static_cast<int32_t>(args.sizes.experts);
  const int32_t capacity = largest_k(params, num_experts);
  int32_t* chosen = experts + token * capacity;
  float* weight = weights + token * capacity;
  k[token] = route_token(
      params, args.inputs.floats(MoeInput::kRouterLogits) + token * num_experts, num_experts,
      args.inputs.floats(MoeInput::kCorrectionBias), args.inputs.floats(MoeInput::kExpertNorms),
      policies.row(policies.index[token]), buffers->get(num_experts, params.n_group), capacity,
      chosen, weight, entropy + token, read);
  std::fill(chosen + k[token], chosen + capacity, -1);
  std::fill(weight + k[token], weight + capacity, 0.0f);
}

// Has the tokens that share choose again among what the step reads (see sharing.h).
void share(const MoeParams& params, const MoeArguments& args, const Policies& policies, bool serial,
           int64_t grain, int32_t* k, float* entropy, int32_t* experts, float* weights) {
  const int64_t tokens = args.sizes.tokens;
  const auto shares = [&](int64_t t) {
    return takes_part(policies.row(policies.index[t]), entropy[t]);
  };
  int64_t first = 0;
  while (first < tokens && !shares(first)) ++first;
  if (first == tokens) return;

  const auto num_experts = static_cast<int32_t>(args.sizes.experts);
  const SharingStep step = {tokens,
                            largest_k(params, num_experts),
                            policies.count,
                            policies.choices,
                            policies.index,
                            policies.kind,
                            policies.thresholds,
                            policies.k_values,
                            k,
                            entropy,
                            experts,
                            weights};
  std::vector<uint8_t> paid(num_experts), read;
  const int64_t expert_grain = std::max<int64_t>(1, 4096 / tokens);
  parallel_for(num_experts, expert_grain, serial, [&](int64_t e) {
    Payment payment;
    for (int64_t t = 0; t < tokens && !payment.kept; ++t)
      pay(step, t, static_cast<int32_t>(e), &payment);
    paid[e] = pays(payment);
  });
  read = paid;
  std::vector<double> worth(num_experts);
  for (int32_t p = 0; p < policies.count; ++p) {
    if (policies.kind[p] != static_cast<int32_t>(PolicyKind::kSharedExperts)) continue;
    parallel_for(num_experts, expert_grain, serial, [&](int64_t e) {
      worth[e] = 0;
      for (int64_t t = 0; t < tokens; ++t)
        give_to_row(step, t, p, static_cast<int32_t>(e), &worth[e]);
    });
    const int32_t additions = additions_of_row(policies.row(p));
    for (int32_t e = 0; e < num_experts; ++e)
      read[e] |= is_added(worth.data(), paid.data(), num_experts, e, additions);
  }
  parallel_for(tokens, grain, serial, [&](int64_t t) {
    if (shares(t)) route_one(params, args, policies, t, read.data(), k, entropy, experts, weights);
  });
}

}  // namespace

void route(const MoeParams& params, const MoeArguments& args, int32_t* k, float* entropy,
           int32_t* experts, float* weights) {
  const Policies policies(args);
  const bool serial = args.sizes.tokens * args.sizes.experts < 2048;
  const int64_t grain = std::max<int64_t>(1, 1024 / args.sizes.experts);
  parallel_for(args.sizes.tokens, grain, serial, [&](int64_t t) {
    route_one(params, args, policies, t, nullptr, k, entropy, experts, weights);
  });
  share(params, args, policies, serial, grain, k, entropy, experts, weights);
}

void moe(const MoeParams& params, const MoeArguments& args, float* output, int32_t* k,
         float* entropy) {
  const int64_t tokens = args.sizes.tokens, hidden = args.sizes.hidden;
  if (tokens == 0) return;
  const ScratchLease lease;
  Scratch& scratch = *lease;
  const auto num_experts = static_cast<int32_t>(args.sizes.experts);
  const auto local_experts = static_cast<int32_t>(args.sizes.local_experts);
  const ExpertRange range = expert_range(params, num_experts, local_experts);
  const int32_t capacity = largest_k(params, num_experts);
  scratch.experts.resize(tokens * capacity);
  scratch.weights.resize(tokens * capacity);
  route(params, args, k, entropy, scratch.experts.data(), scratch.weights.data());
  if (args.expert_load != nullptr) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int32_t i = 0; i < k[t]; ++i) ++args.expert_load[scratch.experts[t * capacity + i]];
  }

  const WeightFormat format = stored_format(params.weight_format, WeightFormat::kFloat32);
  const Kernels& layer_kernels = kernels(format, params.activation_format);
  Layer layer(params, format, args, scratch);
  const float* const hidden_states = args.inputs.floats(MoeInput::kHiddenStates);
  int64_t begin = 0;
  while (begin < tokens) {
    int64_t end = begin, rows = 0;
    while (end < tokens &&
           (end == begin || (rows + k[end]) * (hidden + args.sizes.intermediate) <= kChunkFloats))
      rows += k[end++];
    scratch.plan.build(
        end - begin, range, capacity, layer_kernels.tile_rows, block_rows(layer_kernels), k + begin,
        scratch.experts.data() + begin * capacity, scratch.weights.data() + begin * capacity);
    layer.run(hidden_states + begin * hidden, output + begin * hidden);
    begin = end;
  }
}

}  // namespace adaptive_k::cpu
