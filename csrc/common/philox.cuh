// Philox4x32-10 and the dropout mask: the same bits as ect_kernels/philox.py.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

#if !defined(__CUDACC__)
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
#endif

// The keys of the ten rounds, from the 64-bit seed: where many blocks are drawn they stay in registers.
struct RoundKeys {
  uint32_t a[10], b[10];
  RoundKeys() = default;
  __device__ __forceinline__ explicit RoundKeys(uint64_t seed) {
#pragma unroll
    for (int i = 0; i < 10; i++) { a[i] = uint32_t(seed) + i * 0x9E3779B9u; b[i] = uint32_t(seed >> 32) + i * 0xBB67AE85u; }
  }
};
// Counter = (c0, c1, 0, 0).
__device__ __forceinline__ uint4 philox(const RoundKeys& key, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ key.a[i]; c1 = l1; c2 = h0 ^ c3 ^ key.b[i]; c3 = l0;
  }
  return make_uint4(c0, c1, c2, c3);
}
// The seed again: what follows from it is not worked out ahead of a loop whose registers are short.
__device__ __forceinline__ uint64_t anew(uint64_t seed) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(seed));
#endif
  return seed;
}
__device__ __forceinline__ uint4 philox(uint64_t seed, uint32_t c0, uint32_t c1) { return philox(RoundKeys(seed), c0, c1); }

// Element k (0..7) of a block of eight: word k / 2, low half first; kept where the 16-bit value is at least the threshold, which
// `limit` holds in its upper half.
__device__ __forceinline__ bool keep8(const uint4& w, int k, uint32_t limit) {
  const uint32_t word = k < 2 ? w.x : k < 4 ? w.y : k < 6 ? w.z : w.w;
  return ((k & 1) ? word : word << 16) >= limit;
}

// cos and sin of 2 pi u
__device__ __forceinline__ void turn(float u, float& cosine, float& sine) {
#if defined(__CUDACC__)
  sincospif(2.f * u, &sine, &cosine);
#else
  cosine = float(cos(6.283185307179586 * u)); sine = float(sin(6.283185307179586 * u));
#endif
}
// Uniform in (0, 1].
__device__ __forceinline__ float uniform(uint32_t word) { return (float(word >> 8) + 0.5f) * 0x1p-24f; }
// Box-Muller, as philox.normal in Python pairs the words.
__device__ __forceinline__ void normal4(const uint4& w, float (&z)[4]) {
  const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const float radius = sqrtf(-2.f * logf(uniform(word[k])));
    float cosine, sine;
    turn(uniform(word[k + 1]), cosine, sine);
    z[k] = radius * cosine; z[k + 1] = radius * sine;
  }
}
