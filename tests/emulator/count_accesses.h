// Compiled in front of a .cu file with -fsanitize=thread, but without its runtime (emulator kind "count"): g++ then calls one of
// the functions below at every load and store, however it is written, and they count those that go to a tensor, byte by byte.
#pragma once
#include "cuda_compat.h"

namespace count_accesses {
struct Tensor { uintptr_t begin; size_t bytes; uint16_t *reads, *writes; };   // a counter for each byte
inline Tensor tensors[64];
inline int tensor_count = 0;
struct Access { uint64_t address; uint32_t bytes, write, thread, block; };   // of a tensor, in the order of each thread
inline Access* accesses = nullptr;
inline size_t access_count = 0, access_room = 0;

CH_RAW void add(const void* p, size_t bytes, bool write) {
  for (int i = 0; i < tensor_count; i++) {
    const Tensor& t = tensors[i];
    const size_t at = reinterpret_cast<uintptr_t>(p) - t.begin;
    if (at >= t.bytes) continue;
    uint16_t* counters = (write ? t.writes : t.reads) + at;
    for (size_t k = 0; k < bytes; k++) counters[k]++;
    if (access_count < access_room)
      accesses[access_count++] = {t.begin + at, uint32_t(bytes), write, threadIdx.x + blockDim.x * threadIdx.y, blockIdx.x + gridDim.x * blockIdx.y};
    return;
  }
}
}  // namespace count_accesses

#define CH_COUNTED __attribute__((no_sanitize_thread, weak, used, visibility("default")))
#define CH_COUNT(name, bytes) \
  extern "C" CH_COUNTED void __tsan_read##name(void* p) { count_accesses::add(p, bytes, false); } \
  extern "C" CH_COUNTED void __tsan_write##name(void* p) { count_accesses::add(p, bytes, true); } \
  extern "C" CH_COUNTED void __tsan_unaligned_read##name(void* p) { count_accesses::add(p, bytes, false); } \
  extern "C" CH_COUNTED void __tsan_unaligned_write##name(void* p) { count_accesses::add(p, bytes, true); }
CH_COUNT(1, 1) CH_COUNT(2, 2) CH_COUNT(4, 4) CH_COUNT(8, 8) CH_COUNT(16, 16)
extern "C" CH_COUNTED void __tsan_read_range(void* p, size_t bytes) { count_accesses::add(p, bytes, false); }
extern "C" CH_COUNTED void __tsan_write_range(void* p, size_t bytes) { count_accesses::add(p, bytes, true); }
extern "C" CH_COUNTED void __tsan_init() {}
extern "C" CH_COUNTED void __tsan_func_entry(void*) {}
extern "C" CH_COUNTED void __tsan_func_exit() {}
extern "C" CH_COUNTED void __tsan_vptr_update(void*, void*) {}

// 0, or 1 where there are too many tensors.
extern "C" CH_COUNTED int count_tensor(const void* p, size_t bytes, uint16_t* reads, uint16_t* writes) {
  using namespace count_accesses;
  if (tensor_count == sizeof tensors / sizeof *tensors) return 1;
  tensors[tensor_count++] = {reinterpret_cast<uintptr_t>(p), bytes, reads, writes};
  return 0;
}
// Writes the next accesses down as well, up to `room` of them; gives the number of those written down before.
extern "C" CH_COUNTED size_t list_accesses(void* p, size_t room) {
  using namespace count_accesses;
  const size_t before = access_count;
  accesses = static_cast<Access*>(p); access_room = room; access_count = 0;
  return before;
}
extern "C" CH_COUNTED void count_no_tensor() { count_accesses::tensor_count = 0; }
