// SPDX-License-Identifier: Apache-2.0
// Small kernels, right and wrong, that show what the interpreter computes and what it objects to.
// Runs the one that is named and prints "ok", what came out wrong, or the interpreter's sentence.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace {

using adaptive_k::cuda::kAllLanes;
using adaptive_k::cuda::shared_memory;

// Each thread writes its number and reads its neighbour's from another warp.
void exchange(int* out, bool with_barrier) {
  struct Shared {
    int values[128];
  };
  auto& shared = shared_memory<Shared>();
  shared.values[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
  if (with_barrier) __syncthreads();
  out[blockIdx.x * 128 + threadIdx.x] = shared.values[(threadIdx.x + 32) % 128];
}

void divergent_barrier(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void early_exit(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

void shuffles(int* out) {
  int sum = static_cast<int>(threadIdx.x % 32);
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  int before = 1;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, delta);
    if (static_cast<int>(threadIdx.x % 32) >= delta) before += other;
  }
  const unsigned odd = __ballot_sync(kAllLanes, threadIdx.x % 2 == 1);
  out[threadIdx.x] = sum == 496 && before == static_cast<int>(threadIdx.x % 32) + 1 &&
                     odd == 0xaaaaaaaau && __shfl_sync(kAllLanes, sum, 3) == 496;
}

void not_in_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xfffffffeu, 1, 1); }

void missing_lane(int* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
}

void lane_at_barrier(int* out) {
  if (threadIdx.x % 32 == 7) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
    __syncthreads();
  }
}

void different_masks(int* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? kAllLanes : 0xffff0000u;
  out[threadIdx.x] = __shfl_sync(mask, 1, 20);
}

void outside_source(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}

void mixed_operations(int* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  } else {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kAllLanes, true));
  }
}

void misaligned(int* out) {
  out[threadIdx.x] = static_cast<int>(adaptive_k::cuda::load_streaming(out + 1).x);
}

void too_much_shared(int* out) {
  struct Shared {
    int values[1000];
  };
  out[threadIdx.x] = shared_memory<Shared>().values[0];
}

void past_shared(int* out) {
  struct Shared {
    int values[33];
  };
  int* values = shared_memory<Shared>().values;
  out[threadIdx.x] = values[threadIdx.x % 33 + (threadIdx.x == 100 ? 33 : 0)];
}

void async_copy(int* out, const int* in, bool wait) {
  struct Shared {
    alignas(16) int values[128][4];
  };
  auto& shared = shared_memory<Shared>();
  simt::copy_async(shared.values[threadIdx.x], in + threadIdx.x * 4, 16);
  simt::copy_async_commit();
  if (wait) simt::copy_async_wait(0);
  out[threadIdx.x] = shared.values[threadIdx.x][0];
  simt::copy_async_wait(0);
}

void abandoned_copy(int* out, const int* in) {
  simt::copy_async(shared_memory<int[128][4]>()[threadIdx.x], in + threadIdx.x * 4, 16);
  simt::copy_async_commit();
  out[threadIdx.x] = 0;
}

void counts(int* out) {
  atomicAdd(out, 1);
  atomicOr(out + 1, 1 << threadIdx.x % 31);
}

}  // namespace

extern "C" {
void simt_set_seed(uint64_t seed);
const char* simt_last_error();
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  std::vector<int> out(512, -1), in(512);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i) + 1;
  const dim3 one(1), threads(128);
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    simt_set_seed(seed);
    cudaError_t status = cudaSuccess;
    bool right = true;
    const auto launch = [&](auto kernel, auto... more) {
      status = adaptive_k::cuda::launch_kernel(name.c_str(), kernel, one, threads, 2048, nullptr,
                                               out.data(), more...);
    };
    if (name == "exchange" || name == "exchange_without_barrier") {
      status = adaptive_k::cuda::launch_kernel(name.c_str(), exchange, dim3(4), threads, 512,
                                               nullptr, out.data(), name == "exchange");
      for (int i = 0; i < 512; ++i) right = right && out[i] == (i % 128 + 32) % 128 + 1;
    } else if (name == "shuffles") {
      launch(shuffles);
      for (int i = 0; i < 128; ++i) right = right && out[i] == 1;
    } else if (name == "counts") {
      out[0] = out[1] = 0;
      launch(counts);
      right = out[0] == 128 && out[1] == 0x7fffffff;
    } else if (name == "async_copy" || name == "async_copy_too_early") {
      launch(async_copy, static_cast<const int*>(in.data()), name == "async_copy");
      for (int i = 0; i < 128; ++i) right = right && out[i] == 4 * i + 1;
    } else if (name == "abandoned_copy") {
      launch(abandoned_copy, static_cast<const int*>(in.data()));
    } else if (name == "past_shared") {
      status = adaptive_k::cuda::launch_kernel(name.c_str(), past_shared, one, threads, 33 * 4,
                                               nullptr, out.data());
    } else if (name == "too_many_threads") {
      status = adaptive_k::cuda::launch_kernel(name.c_str(), counts, one, dim3(1025), 0, nullptr,
                                               out.data());
    } else {
      const struct {
        const char* name;
        void (*kernel)(int*);
      } kernels[] = {{"divergent_barrier", divergent_barrier},
                     {"early_exit", early_exit},
                     {"not_in_mask", not_in_mask},
                     {"missing_lane", missing_lane},
                     {"lane_at_barrier", lane_at_barrier},
                     {"different_masks", different_masks},
                     {"outside_source", outside_source},
                     {"misaligned", misaligned},
                     {"mixed_operations", mixed_operations},
                     {"too_much_shared", too_much_shared}};
      bool known = false;
      for (const auto& k : kernels) {
        if (name != k.name) continue;
        known = true;
        launch(k.kernel);
      }
      if (!known) {
        std::puts("no such kernel");
        return 2;
      }
    }
    if (status != cudaSuccess) {
      std::puts(simt_last_error());
      return 0;
    }
    if (!right) {
      std::printf("wrong with seed %d\n", static_cast<int>(seed));
      return 0;
    }
  }
  std::puts("ok");
  return 0;
}
