// 16-byte copies from global to shared memory without registers (cp.async), in groups: copy_commit() ends a group, and
// copy_wait_but(n) waits for all but the latest n of them (the thread's own: for the others' take a barrier too).
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

#if defined(__CUDACC__)
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_wait_but(int groups) {   // the instruction takes constants alone
  if (groups >= 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  else if (groups == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (groups == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else asm volatile("cp.async.wait_group 0;" ::: "memory");
}
#else
#include "async_host.h"
#endif
