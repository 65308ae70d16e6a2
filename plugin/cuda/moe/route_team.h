// SPDX-License-Identifier: Apache-2.0
// The routing of one token by a team of one warp (up to 128 experts) or of four
// (up to 512), in one pass: every thread keeps up to four experts' keys and
// scores in registers. The rules are those of routing.h; where one of its
// functions takes a whole row, the row lies in shared memory.
#pragma once

#include <cmath>

#include "cuda/device.h"
#include "cuda/moe/route.h"
#include "operator/moe/routing.h"

namespace adaptive_k::cuda {

constexpr int kExpertsPerThread = 4;
constexpr int kNoExpert = 0x7fffffff;

template <int kWarps>
struct TeamShared {
  static constexpr int kExperts = kWarps * 32 * kExpertsPerThread;
  double slots[2][kWarps];
  float keys[kExperts];
  float group_keys[kExperts];
  int32_t best_groups[kExperts];
  int32_t group_kept[kExperts];
  float selected_scores[kMaxK];
  int32_t selected[kMaxK];
  int32_t k;
};

// A candidate for selection. A thread without one offers {NaN, kNoExpert},
// which ranks last.
struct Candidate {
  float key;
  int32_t index;
};

__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  if (fault(kFaultRouteTie) && a.key == b.key) return a.index > b.index ? a : b;
  return ranks_before(a.key, a.index, b.key, b.index) ? a : b;
}

template <int kWarps>
class Team {
 public:
  static constexpr int kThreads = kWarps * 32;

  __device__ explicit Team(TeamShared<kWarps>& shared)
      : shared_(shared), rank_(static_cast<int>(threadIdx.x) % kThreads) {}

  __device__ int rank() const { return rank_; }

  __device__ void sync() {
    if (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Every thread gets the same bits: the operations commute, and all follow the
  // same tree.
  template <typename T, typename Operation>
  __device__ T reduce(T value, Operation operation) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
      value = operation(value, __shfl_xor_sync(kAllLanes, value, bits));
    if (kWarps == 1) return value;
    T* slots = next_slots<T>();
    if (rank_ % 32 == 0) slots[rank_ / 32] = value;
    publish_slots();
    value = slots[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = operation(value, slots[w]);
    return value;
  }

  __device__ Candidate best(Candidate mine) {
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) {
      Candidate other;
      other.key = __shfl_xor_sync(kAllLanes, mine.key, bits);
      other.index = __shfl_xor_sync(kAllLanes, mine.index, bits);
      mine = better(mine, other);
    }
    if (kWarps == 1) return mine;
    Candidate* slots = next_slots<Candidate>();
    if (rank_ % 32 == 0) slots[rank_ / 32] = mine;
    publish_slots();
    mine = slots[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) mine = better(mine, slots[w]);
    return mine;
  }

 private:
  // Two sets in turn: a thread that writes a set again has passed the barrier
  // between, which all threads reach only after they read it.
  template <typename T>
  __device__ T* next_slots() {
    static_assert(sizeof(T) <= sizeof(double), "a slot holds one double");
    turn_ ^= 1;
    return reinterpret_cast<T*>(shared_.slots[turn_]);
  }

  __device__ void publish_slots() {
    if (!fault(kFaultRouteBarrier)) __syncthreads();
  }

  TeamShared<kWarps>& shared_;
  const int rank_;
  int turn_ = 0;
};

// At a fixed k an entropy row needs nothing but the entropy; the team computes
// all the same things for every kind of row, since they cost less than a second
// path would. With `read` [num_experts], only experts that are marked in it can be selected: then
// k may be 0.
template <int kWarps>
__device__ void route_with_team(const RouteArguments& a, int64_t token, const uint8_t* read,
                                Team<kWarps>& team, TeamShared<kWarps>& shared) {
  const int num_experts = a.num_experts;
  const float* logits = a.logits + token * num_experts;
  const auto larger = [](double x, double y) { return y > x ? y : x; };
  const auto sum = [](double x, double y) { return x + y; };
  const auto count = [](int x, int y) { return x + y; };

  // As summarize_softmax(), with the sums spread over the team.
  float logit[kExpertsPerThread];
  double p[kExpertsPerThread];
  SoftmaxSummary softmax;
  softmax.max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i) {
    const int e = team.rank() + i * Team<kWarps>::kThreads;
    logit[i] = e < num_experts ? logits[e] : -INFINITY;
    softmax.max = logit[i] > softmax.max ? logit[i] : softmax.max;
  }
  softmax.max = team.reduce(softmax.max, larger);
  double mass = 0, weighted = 0;
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i) {
    const int e = team.rank() + i * Team<kWarps>::kThreads;
    p[i] = 0;
    if (e >= num_experts) continue;
    if (fault(kFaultRouteEntropy) && e == num_experts - 1) continue;
    const double d = logit[i] - softmax.max;
    p[i] = exp(d);
    mass += p[i];
    weighted += p[i] == 0 ? 0 : p[i] * d;
  }
  softmax.sum = team.reduce(mass, sum);
  weighted = team.reduce(weighted, sum);
  softmax.entropy = log(softmax.sum) - weighted / softmax.sum;
  if (softmax.entropy < 0) softmax.entropy = 0;
  const float entropy = static_cast<float>(softmax.entropy);

  float score[kExpertsPerThread], key[kExpertsPerThread];
  const bool by_logit = a.correction_bias == nullptr && a.params.scoring == Scoring::kSoftmax;
  double total = 0;
  float best_score = -INFINITY;
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i) {
    const int e = team.rank() + i * Team<kWarps>::kThreads;
    score[i] = key[i] = 0;
    if (e >= num_experts) continue;
    score[i] = a.params.scoring == Scoring::kSoftmax ? static_cast<float>(p[i] / softmax.sum)
                                                     : sigmoid_score(logit[i]);
    key[i] = by_logit ? logit[i]
                      : score[i] + (a.correction_bias != nullptr ? a.correction_bias[e] : 0.0f);
    total += score[i];
    best_score = score[i] > best_score ? score[i] : best_score;
  }

  int64_t policy = a.policy_index[token];
  policy = policy < 0 ? 0 : policy < a.num_policies ? policy : a.num_policies - 1;
  const PolicyRow row = {a.policy_kind[policy], a.thresholds + policy * (a.num_choices - 1),
                         a.k_values + policy * a.num_choices, a.num_choices};
  // All of the team are here: they follow the same row.
  int32_t k = k_to_rank(row, entropy, [&] {
    best_score = static_cast<float>(team.reduce(static_cast<double>(best_score), larger));
    const float limit = parameter_of(row, 0.0f) * best_score;
    int reached = 0;
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i)
      reached += team.rank() + i * Team<kWarps>::kThreads < num_experts && score[i] >= limit;
    return clamp_k(team.reduce(reached, count), k_min_of(row), k_max_of(row));
  });
  k = clamp_k(k, 1, a.capacity);
  if (needs_total(row, entropy)) total = team.reduce(total, sum);

  // Experts that may be selected: those of the best groups.
  bool open[kExpertsPerThread];
  const int n_group = a.params.n_group;
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i)
    open[i] = team.rank() + i * Team<kWarps>::kThreads < num_experts;
  if (n_group > 1) {
    const int group_size = num_experts / n_group;
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i)
      if (open[i]) shared.keys[team.rank() + i * Team<kWarps>::kThreads] = key[i];
    team.sync();
    for (int g = team.rank(); g < n_group; g += Team<kWarps>::kThreads) {
      shared.group_keys[g] =
          group_score(a.params.scoring, shared.keys + g * group_size, group_size);
      shared.group_kept[g] = 0;
    }
    team.sync();
    if (team.rank() == 0) {
      int kept = 0;
      for (int g = 0; g < n_group; ++g)
        kept = insert_ranked(shared.group_keys, g, shared.best_groups, kept, a.params.topk_group);
      for (int i = 0; i < kept; ++i) shared.group_kept[shared.best_groups[i]] = 1;
    }
    team.sync();
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i)
      if (open[i])
        open[i] = shared.group_kept[(team.rank() + i * Team<kWarps>::kThreads) / group_size] != 0;
  }

  // Groups are compared by all of their experts, read or not.
  if (read != nullptr && !fault(kFaultShareMask)) {
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i)
      if (open[i]) open[i] = read[team.rank() + i * Team<kWarps>::kThreads] != 0;
  }

  for (int j = 0; j < k; ++j) {
    Candidate mine = {NAN, kNoExpert};
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (open[i]) mine = better({key[i], team.rank() + i * Team<kWarps>::kThreads}, mine);
    }
    const Candidate chosen = team.best(mine);
    if (chosen.index == kNoExpert) {  // fewer are read
      k = j;
      break;
    }
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (chosen.index == team.rank() + i * Team<kWarps>::kThreads) {
        open[i] = false;
        shared.selected[j] = chosen.index;
        shared.selected_scores[j] = score[i];
      }
    }
  }
  team.sync();

  if (team.rank() == 0) {
    const float* norms = fault(kFaultRouteNorm) ? nullptr : a.expert_norms;
    k = k_of_ranked(row, entropy, norms, shared.selected, shared.selected_scores, k, total);
    if (!fault(kFaultRouteWeight)) weigh(a.params, shared.selected_scores, k);
    shared.k = k;
    a.k[token] = k;
    a.entropy[token] = entropy;
  }
  team.sync();
  k = shared.k;
  for (int j = team.rank(); j < a.capacity; j += Team<kWarps>::kThreads) {
    a.experts[token * a.capacity + j] = j < k ? shared.selected[j] : -1;
    a.weights[token * a.capacity + j] = j < k ? shared.selected_scores[j] : 0.0f;
  }
}

}  // namespace adaptive_k::cuda
