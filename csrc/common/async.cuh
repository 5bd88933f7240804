// 16-byte copies from global to shared memory without registers (cp.async), in groups: copy_commit() ends a group, and
// copy_wait_but(n) waits for all but the latest n of them. On the CPU the copy happens at the wait, so that a missing wait shows as NaN.
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
#include <cstdlib>
namespace async_copy {   // bookkeeping the thread sanitizer must not see; the copies themselves it must
struct Copy { int thread, group; void* to; const void* from; };
inline Copy pending[cuda_host::ARENA / 16];   // all a block's shared memory can take
inline int count = 0, committed[1024];        // groups that a thread has ended
inline size_t block = 0;
CH_RAW void enter() {   // what a block has left behind is not the next one's
  if (block == cuda_host::rt.serial) return;
  block = cuda_host::rt.serial; count = 0;
  for (int& groups : committed) groups = 0;
}
CH_RAW int me() { return cuda_host::cur->lin; }
CH_RAW void push(void* to, const void* from) {
  enter();
  if (count == cuda_host::ARENA / 16) abort();
  pending[count++] = {me(), committed[me()], to, from};
}
CH_RAW void commit() { enter(); committed[me()]++; }
CH_RAW bool pop(int but, Copy& c) {   // a copy of this thread's groups but the last ones; none of a group that is still open
  enter();
  for (int i = 0; i < count; i++)
    if (pending[i].thread == me() && pending[i].group < committed[me()] - but) { c = pending[i]; pending[i] = pending[--count]; return true; }
  return false;
}
}
inline void copy16_async(void* shared, const void* global, CH_LOC) {
  cuda_host::check_space(shared, true, loc);
  cuda_host::check_space(global, false, loc);
  async_copy::push(shared, global);
}
inline void copy_commit() { async_copy::commit(); }
inline void copy_wait_but(int groups) {   // this thread's own copies alone: the others' need their wait and a barrier
  async_copy::Copy c;
  while (async_copy::pop(groups < 3 ? groups : 3, c)) *static_cast<uint4*>(c.to) = *static_cast<const uint4*>(c.from);
}
#endif
