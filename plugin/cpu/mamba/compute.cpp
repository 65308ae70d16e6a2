// SPDX-License-Identifier: Apache-2.0
#include "cpu/mamba/compute.h"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/mamba/kernels/kernels.h"
#include "cpu/scratch.h"

namespace adaptive_k::cpu {
namespace {

// State floats, each counted once a token, that are worth a task of their own.
constexpr int64_t kTaskFloats = 16 << 10;
// Channels that a task of the convolution takes, and products that are worth one.
constexpr int64_t kTaskChannels = 2048;
constexpr int64_t kTaskProducts = 16 << 10;

[[noreturn]] void fail(const std::string& sentence) { throw std::invalid_argument(sentence); }

// Calls body(i) for i in [0, n), at least `grain` calls to a task.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= grain) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  tbb::parallel_for(tbb::blocked_range<int64_t>(0, n, grain),
                    [&](const tbb::blocked_range<int64_t>& range) {
                      for (int64_t i = range.begin(); i < range.end(); ++i) body(i);
                    });
}

void check_values(const MambaArguments& args) {
  const MambaSizes& s = args.sizes;
  if (args.subsequence_begins[0] != 0 || args.subsequence_begins[s.sequences] != s.tokens)
    fail("input subsequence_begins must go from 0 to the " + std::to_string(s.tokens) + " tokens");
  std::vector<int32_t> slots(args.state_slots, args.state_slots + s.sequences);
  std::sort(slots.begin(), slots.end());
  for (int64_t i = 0; i < s.sequences; ++i) {
    if (args.subsequence_begins[i + 1] < args.subsequence_begins[i])
      fail("input subsequence_begins falls after sequence " + std::to_string(i));
    if (args.past_lens[i] < 0)
      fail("input past_lens has " + std::to_string(args.past_lens[i]) + " for sequence " +
           std::to_string(i));
    if (slots[i] < kNoSlot || slots[i] >= s.slots)
      fail("input state_slots has " + std::to_string(slots[i]) + " but there are " +
           std::to_string(s.slots) + " slots");
    if (i > 0 && slots[i] != kNoSlot && slots[i] == slots[i - 1])
      fail("input state_slots has " + std::to_string(slots[i]) + " twice");
  }
}

// One call of the operator.
class Mixer {
 public:
  Mixer(const MambaParams& params, const MambaArguments& args, Scratch& scratch, float* y)
      : params_(params),
        args_(args),
        sizes_(args.sizes),
        kernels_(mamba_kernels()),
        y_(y),
        mixed_(scratch.x.reserve(sizes_.tokens * sizes_.channels)),
        decay_(scratch.h.reserve(2 * sizes_.tokens * sizes_.heads)),
        dt_(decay_ + sizes_.tokens * sizes_.heads) {}

  void run() {
    find_sequences();
    convolve();
    keep_inputs();
    find_steps();
    scan();
  }

 private:
  const float* input(int64_t token) const { return args_.conv_input + token * sizes_.channels; }
  float* conv_state(int64_t sequence, int64_t row) const {
    return args_.conv_state +
           (args_.state_slots[sequence] * (sizes_.taps - 1) + row) * sizes_.channels;
  }
  bool has_slot(int64_t sequence) const { return args_.state_slots[sequence] != kNoSlot; }
  int64_t length(int64_t sequence) const {
    return args_.subsequence_begins[sequence + 1] - args_.subsequence_begins[sequence];
  }

  void find_sequences() {
    sequence_of_.resize(sizes_.tokens);
    for (int64_t s = 0; s < sizes_.sequences; ++s)
      std::fill(sequence_of_.begin() + args_.subsequence_begins[s],
                sequence_of_.begin() + args_.subsequence_begins[s + 1], static_cast<int32_t>(s));
  }

  // mixed_ [T, channels]: the convolution's output behind its activation.
  void convolve() const {
    const std::vector<float> zeros(sizes_.channels, 0.0f);
    const int64_t parts = (sizes_.channels + kTaskChannels - 1) / kTaskChannels;
    const int64_t products = std::min(sizes_.channels, kTaskChannels) * sizes_.taps;
    const int64_t grain = std::max<int64_t>(1, kTaskProducts / products);
    parallel_for(sizes_.tokens * parts, grain, [&](int64_t i) {
      const int64_t token = i / parts, first = i % parts * kTaskChannels;
      const int64_t sequence = sequence_of_[token];
      if (!has_slot(sequence)) return;
      const int64_t begin = args_.subsequence_begins[sequence];
      const float* rows[kMambaMaxTaps];
      for (int64_t k = 0; k < sizes_.taps; ++k) {
        const int64_t position = token - sizes_.taps + 1 + k;
        if (position >= begin)
          rows[k] = input(position) + first;
        else if (args_.past_lens[sequence] > 0)
          rows[k] = conv_state(sequence, token - begin + k) + first;
        else
          rows[k] = zeros.data() + first;
      }
      kernels_.convolve(rows, args_.conv_weight + first, sizes_.channels,
                        static_cast<int>(sizes_.taps), args_.conv_bias + first,
                        std::min(kTaskChannels, sizes_.channels - first),
                        mixed_ + token * sizes_.channels + first);
    });
  }

  // The last K - 1 inputs of each sequence stay in its slot.
  void keep_inputs() const {
    const int64_t kept = sizes_.taps - 1;
    const size_t bytes = sizes_.channels * sizeof(float);
    for (int64_t s = 0; s < sizes_.sequences; ++s) {
      const int64_t begin = args_.subsequence_begins[s], count = length(s);
      if (count == 0 || !has_slot(s)) continue;
      for (int64_t row = 0; row < kept; ++row) {
        const int64_t from = row + count - kept;  // from here in this step; before 0 in the slot
        if (from >= 0)
          std::memcpy(conv_state(s, row), input(begin + from), bytes);
        else if (args_.past_lens[s] > 0)
          std::memcpy(conv_state(s, row), conv_state(s, row + count), bytes);
        else
          std::memset(conv_state(s, row), 0, bytes);
      }
    }
  }

  void find_steps() const {
    parallel_for(sizes_.tokens, std::max<int64_t>(1, 512 / sizes_.heads), [&](int64_t token) {
      for (int64_t head = 0; head < sizes_.heads; ++head) {
        const int64_t i = token * sizes_.heads + head;
        const MambaStep<double> step =
            mamba_step<double>(params_, args_.dt[i], args_.dt_bias[head], args_.a[head]);
        decay_[i] = static_cast<float>(std::exp(step.log_decay));
        dt_[i] = static_cast<float>(step.dt);
      }
    });
  }

  void scan() const {
    const int64_t heads = sizes_.heads, width = heads * sizes_.head_dim;
    const int64_t state_floats = sizes_.state_size * sizes_.head_dim;
    const int64_t heads_per_group = heads / params_.n_groups;
    const int64_t work =
        std::max<int64_t>(1, sizes_.tokens / std::max<int64_t>(1, sizes_.sequences));
    const int64_t grain = std::max<int64_t>(1, kTaskFloats / (state_floats * work));
    parallel_for(sizes_.sequences * heads, grain, [&](int64_t i) {
      const int64_t sequence = i / heads, head = i % heads, group = head / heads_per_group;
      const int64_t begin = args_.subsequence_begins[sequence];
      MambaScan s;
      s.tokens = length(sequence);
      s.y = y_ + begin * width + head * sizes_.head_dim;
      s.y_stride = width;
      s.head_dim = sizes_.head_dim;
      if (!has_slot(sequence))
        for (int64_t t = 0; t < s.tokens; ++t) std::fill_n(s.y + t * s.y_stride, s.head_dim, 0.0f);
      if (s.tokens == 0 || !has_slot(sequence)) return;
      s.state_size = sizes_.state_size;
      const float* mixed = mixed_ + begin * sizes_.channels;
      s.x = mixed + head * sizes_.head_dim;
      s.b = mixed + width + group * sizes_.state_size;
      s.c = s.b + params_.n_groups * sizes_.state_size;
      s.stride = sizes_.channels;
      s.decay = decay_ + begin * heads + head;
      s.dt = dt_ + begin * heads + head;
      s.step_stride = heads;
      s.d = args_.d[head];
      s.state = args_.ssm_state + (args_.state_slots[sequence] * heads + head) * state_floats;
      if (args_.past_lens[sequence] == 0) std::fill(s.state, s.state + state_floats, 0.0f);
      kernels_.scan(s);
    });
  }

  const MambaParams& params_;
  const MambaArguments& args_;
  const MambaSizes& sizes_;
  const MambaKernels& kernels_;
  float* y_;
  float* mixed_;
  float* decay_;  // [T, heads], and dt_ as well
  float* dt_;
  std::vector<int32_t> sequence_of_;  // [T]
};

}  // namespace

MambaArguments::MambaArguments(const MambaSizes& sizes, const Addresses<MambaInput>& inputs)
    : sizes(sizes),
      conv_input(inputs.floats(MambaInput::kConvInput)),
      dt(inputs.floats(MambaInput::kDt)),
      subsequence_begins(inputs.integers(MambaInput::kSubsequenceBegins)),
      past_lens(inputs.integers(MambaInput::kPastLens)),
      state_slots(inputs.integers(MambaInput::kStateSlots)),
      conv_weight(inputs.floats(MambaInput::kConvWeight)),
      conv_bias(inputs.floats(MambaInput::kConvBias)),
      a(inputs.floats(MambaInput::kA)),
      d(inputs.floats(MambaInput::kD)),
      dt_bias(inputs.floats(MambaInput::kDtBias)),
      // The addresses are of constant memory and the states are the caller's to be written.
      conv_state(const_cast<float*>(inputs.floats(MambaInput::kConvState))),
      ssm_state(const_cast<float*>(inputs.floats(MambaInput::kSsmState))) {}

void mamba2(const MambaParams& params, const MambaArguments& args, float* y) {
  if (args.sizes.tokens == 0) return;
  check_values(args);
  const ScratchLease lease;
  Mixer(params, args, *lease, y).run();
}

}  // namespace adaptive_k::cpu
