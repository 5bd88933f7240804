// Philox4x32-10 and the dropout mask: the same bits as ect_kernels/philox.py.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

#if !defined(__CUDACC__)
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
#endif

// Key = the 64-bit seed, counter = (c0, c1, 0, 0).
__device__ __forceinline__ uint4 philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Element k (0..7) of a block of eight: word k / 2, low half first; kept where the 16-bit value is at least `threshold`.
__device__ __forceinline__ bool keep8(const uint4& w, int k, uint32_t threshold) {
  const uint32_t word = k < 2 ? w.x : k < 4 ? w.y : k < 6 ? w.z : w.w;
  return ((k & 1) ? word >> 16 : word & 0xffffu) >= threshold;
}
