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
#include <cstdlib>
namespace async_copy {   // bookkeeping the thread sanitizer must not see; the copies themselves it must
struct Copy { int thread; void* to; const void* from; };
inline Copy pending[cuda_host::ARENA / 16];   // all a block's shared memory can take
inline int count = 0;
CH_RAW void push(Copy c) {
  if (count == cuda_host::ARENA / 16) abort();
  pending[count++] = c;
}
CH_RAW bool pop(int thread, Copy& c) {
  for (int i = 0; i < count; i++)
    if (pending[i].thread == thread) { c = pending[i]; pending[i] = pending[--count]; return true; }
  return false;
}
inline int me() { return int(threadIdx.x + blockDim.x * threadIdx.y); }
}
inline void copy16_async(void* shared, const void* global, CH_LOC) {
  cuda_host::check_space(shared, true, loc);
  cuda_host::check_space(global, false, loc);
  async_copy::push({async_copy::me(), shared, global});
}
inline void copy_wait() {   // only this thread's own copies: the others' need their wait and a barrier
  async_copy::Copy c;
  while (async_copy::pop(async_copy::me(), c)) *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
}
#endif
