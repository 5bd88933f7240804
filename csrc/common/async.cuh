// 16-byte copies from global to shared memory without registers (cp.async). On the CPU the copy happens at the wait, so that a
// missing wait shows as NaN.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>


#if defined(__CUDACC__)
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
#include <vector>
namespace async_copy {
struct Copy { int thread; void* to; const void* from; };
inline std::vector<Copy> pending;
}
inline void copy16_async(void* shared, const void* global) {
  async_copy::pending.push_back({int(threadIdx.x + blockDim.x * threadIdx.y), shared, global});
}
inline void copy_wait() {   // only this thread's own copies: the others' need their wait and a barrier
  const int me = int(threadIdx.x + blockDim.x * threadIdx.y);
  auto& all = async_copy::pending;
  for (size_t i = 0; i < all.size();) {
    if (all[i].thread != me) { i++; continue; }
    *static_cast<uint4*>(all[i].to) = *static_cast<const uint4*>(all[i].from);
    all[i] = all.back(); all.pop_back();
  }
}
#endif
