// SPDX-License-Identifier: Apache-2.0
// How many threads a call from Python uses.
#pragma once

#include <tbb/task_arena.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>

// Runs body in an arena of that many threads; arenas are kept, since making one costs more than a
// small call.
template <typename Body>
void run_with_threads(std::optional<int> num_threads, const Body& body) {
  if (!num_threads) {
    body();
    return;
  }
  static std::mutex mutex;
  static auto* arenas = new std::map<int, std::unique_ptr<tbb::task_arena>>;
  tbb::task_arena* arena;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<tbb::task_arena>& slot = (*arenas)[*num_threads];
    if (!slot) slot = std::make_unique<tbb::task_arena>(*num_threads);
    arena = slot.get();
  }
  arena->execute(body);
}
