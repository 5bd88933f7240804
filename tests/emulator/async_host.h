// async_host.h - TEST ONLY. cp.async on the CPU: a copy happens when its thread waits for its group, so that a missing wait shows as NaN.
#pragma once
#include "cuda_host.h"
namespace async_copy {   // bookkeeping the thread sanitizer must not see; the copies themselves it must
constexpr int MOST = 4 * cuda_host::ARENA / 16;
struct Copy { int group, next; void* to; const void* from; };
inline Copy copies[MOST];   // of one block, in a list for each thread
inline int count = 0, head[1024], tail[1024], committed[1024];   // committed: groups that a thread has ended
inline size_t block = 0;
CH_RAW int me() {
  if (block != cuda_host::rt.serial) {   // what a block has left behind is not the next one's
    block = cuda_host::rt.serial; count = 0;
    for (int i = 0; i < 1024; i++) { head[i] = tail[i] = -1; committed[i] = 0; }
  }
  return cuda_host::cur->lin;
}
CH_RAW void push(void* to, const void* from) {
  const int i = me();
  if (count == MOST) abort();
  copies[count] = {committed[i], -1, to, from};
  (head[i] < 0 ? head[i] : copies[tail[i]].next) = count;
  tail[i] = count++;
}
CH_RAW void commit() { committed[me()]++; }
CH_RAW bool pop(int but, Copy& c) {   // a thread's first copy, unless it belongs to its last groups or to one that is still open
  const int i = me();
  if (head[i] < 0 || copies[head[i]].group >= committed[i] - but) return false;
  c = copies[head[i]];
  head[i] = c.next;
  return true;
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
