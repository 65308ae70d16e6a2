// SPDX-License-Identifier: Apache-2.0
// Memory for intermediate results, kept between calls so that decoding allocates nothing. A call
// leases a Scratch for its duration: calls that run at the same time have different ones, and the
// layers of a model, which run one after the other, share one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/moe/kernels/kernels.h"
#include "cpu/moe/plan.h"
#include "operator/moe/routing.h"

namespace adaptive_k::cpu {

// Grows and never shrinks; its contents do not survive reserve().
class FloatBuffer {
 public:
  FloatBuffer() = default;
  ~FloatBuffer();
  FloatBuffer(const FloatBuffer&) = delete;
  FloatBuffer& operator=(const FloatBuffer&) = delete;

  float* reserve(int64_t count);

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Room for a task's intermediate results, the thread's own. Only a task without nested parallelism
// may hold it.
float* thread_floats(int64_t count);

class RoutingBuffers {
 public:
  RoutingScratch get(int32_t num_experts, int32_t n_group);

 private:
  std::vector<float> floats_;
  std::vector<int32_t> groups_;
};

struct Scratch {
  std::vector<int32_t> experts;  // [tokens, capacity]
  std::vector<float> weights;    // [tokens, capacity]
  Plan plan;
  FloatBuffer x;  // packed rows of hidden states
  FloatBuffer h;  // packed rows of the experts' hidden values, or floats that are to be packed
  FloatBuffer packed_h;
  std::vector<Tile> x_tiles, h_tiles;
};

class ScratchLease {
 public:
  ScratchLease();
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  Scratch& operator*() const { return *scratch_; }

 private:
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace adaptive_k::cpu
