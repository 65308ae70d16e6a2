// SPDX-License-Identifier: Apache-2.0
// For any processor: vectors of four floats in the compiler's own extension (SSE2 on x86-64, NEON
// on ARM).
#include <cstdint>
#include <cstring>

#include "cpu/moe/kernels/kernels.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace adaptive_k::cpu {
namespace {

struct Simd {
  typedef float V __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Integers __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 3;
  static V zero() { return V{0, 0, 0, 0}; }
  static V broadcast(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static V load(const uint16_t* p) {
    const Bits bits = Bits{p[0], p[1], p[2], p[3]} << 16;
    V v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static V load(const int8_t* p) {
    return __builtin_convertvector((Integers{p[0], p[1], p[2], p[3]}), V);
  }
  static V load(const Int4Pair* p) {
    const Integers values = {p[0].bits & 15, p[0].bits >> 4, p[1].bits & 15, p[1].bits >> 4};
    return __builtin_convertvector((values ^ 8) - 8, V);
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) {
#if defined(__ARM_NEON) && defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;  // rounded twice: the build turns contraction off
#endif
  }
  static void reduce4(const V* a, float* sums) {
    for (int r = 0; r < 4; ++r) sums[r] = (a[r][0] + a[r][2]) + (a[r][1] + a[r][3]);
  }
};

struct Integers {
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kBytes = 16;
  struct B {
    int8_t at[kBytes];
  };
  template <typename W>
  static constexpr int32_t kOffset = 0;

  static B load(const int8_t* p) {
    B b;
    std::memcpy(b.at, p, sizeof b.at);
    return b;
  }
  static B load(const Int4Pair* p) {
    B b;
    for (int i = 0; i < kBytes; ++i)
      b.at[i] = static_cast<int8_t>(((p[i / 2].bits >> i % 2 * 4 & 15) ^ 8) - 8);
    return b;
  }
  static void load_two(const int8_t* p, B* two) {
    two[0] = load(p);
    two[1] = load(p + kBytes);
  }
  static void load_two(const Int4Pair* p, B* two) {
    for (int i = 0; i < kBytes; ++i) {
      two[0].at[i] = static_cast<int8_t>(((p[i].bits & 15) ^ 8) - 8);
      two[1].at[i] = static_cast<int8_t>(((p[i].bits >> 4) ^ 8) - 8);
    }
  }
  // Blocks are multiples of 16.
  template <typename W>
  static B load(const W* p, int /*count*/) {
    return load(p);
  }
  static B load_activations(const int8_t* p, int /*count*/ = kBytes) { return load(p); }
  static I zero() { return I{0, 0, 0, 0}; }
  template <typename W>
  static I dot(I sums, const B& weights, const B& activations) {
    for (int lane = 0; lane < 4; ++lane)
      for (int i = lane * 4; i < lane * 4 + 4; ++i) sums[lane] += weights.at[i] * activations.at[i];
    return sums;
  }
  static I reduce(const I* rows) {
    I sums;
    for (int r = 0; r < 4; ++r) sums[r] = rows[r][0] + rows[r][1] + rows[r][2] + rows[r][3];
    return sums;
  }
  struct Four {
    Simd::V v;

    static Four zero() { return {Simd::zero()}; }
    static Four of(I sums, int32_t offset) {
      return {__builtin_convertvector(sums + offset, Simd::V)};
    }
    Four times(float a, float b, float c, float d) const { return {v * Simd::V{a, b, c, d}}; }
    Four times_plus(float factor, Four other) const {
      return {Simd::fma(v, Simd::broadcast(factor), other.v)};
    }
    void store(float* to) const { Simd::store(to, v); }
  };
};

}  // namespace
}  // namespace adaptive_k::cpu

#include "cpu/moe/kernels/integer_impl.h"

namespace adaptive_k::cpu {
const Kernels kPortableKernels = float_kernels("portable");
const Kernels kPortableIntegerKernels = integer_kernels("portable");
}  // namespace adaptive_k::cpu
