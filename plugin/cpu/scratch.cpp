// SPDX-License-Identifier: Apache-2.0
#include "cpu/scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>

namespace adaptive_k::cpu {
namespace {

// Never destroyed: worker threads may outlive static destructors.
struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> free;
};

Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

FloatBuffer::~FloatBuffer() { std::free(data_); }

float* FloatBuffer::reserve(int64_t count) {
  if (count > capacity_) {
    constexpr int64_t kStep = 1024;  // floats
    const int64_t capacity = (count + kStep - 1) / kStep * kStep;
    float* data = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
    if (data == nullptr) throw std::bad_alloc();
    std::free(data_);
    data_ = data;
    capacity_ = capacity;
  }
  return data_;
}

float* thread_floats(int64_t count) {
  static thread_local FloatBuffer* buffer = nullptr;
  if (buffer == nullptr) buffer = new FloatBuffer;  // lives as long as the thread pool
  constexpr int64_t kReadAhead = 16;                // of Kernels::combine
  return buffer->reserve(count + kReadAhead);
}

RoutingScratch RoutingBuffers::get(int32_t num_experts, int32_t n_group) {
  const size_t floats = 2 * static_cast<size_t>(num_experts) + n_group;
  if (floats_.size() < floats) floats_.resize(floats);
  if (groups_.size() < static_cast<size_t>(n_group)) groups_.resize(n_group);
  float* f = floats_.data();
  return {f, f + num_experts, f + 2 * num_experts, groups_.data()};
}

ScratchLease::ScratchLease() {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    if (!pool().free.empty()) {
      scratch_ = std::move(pool().free.back());
      pool().free.pop_back();
    }
  }
  if (!scratch_) scratch_ = std::make_unique<Scratch>();
}

ScratchLease::~ScratchLease() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().free.push_back(std::move(scratch_));
}

}  // namespace adaptive_k::cpu
