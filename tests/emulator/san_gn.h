// What the sanitizer mains of the two GroupNorm ops share: arrays of exactly the size a kernel may touch, filled with bounded values.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifndef STREAM
#define STREAM nullptr   // a launcher's last argument; for those of csrc/cpu/ it is the number of threads
#endif

struct Shape { int64_t n, hw, c, c2, groups, dtype, shift; };   // shift: bytes between a 16-byte boundary and the tensors
// On chip with 4 and 12 channels a group; read twice; odd sizes; no vectors because of the address; one wide group; two sources.
inline const Shape SHAPES[] = {{2, 64, 64, 0, 16, 1, 0},  {1, 64, 256, 128, 32, 2, 0}, {1, 1024, 32, 16, 1, 2, 0}, {1, 900, 24, 0, 1, 0, 0},
                               {2, 15, 7, 3, 2, 0, 0},    {3, 6, 30, 0, 3, 1, 0},      {1, 9, 32, 0, 4, 2, 2},     {1, 4, 600, 0, 1, 0, 4},
                               {2, 16, 16, 16, 4, 1, 0}};

class Array {
  char* base;
  size_t shift;
public:
  Array(int64_t count, int64_t size, int64_t shift_, uint32_t fill) : shift(shift_) {   // fill 0: NaN, for results
    const size_t bytes = count * size;
    // Ends where its heap block ends, so that the first byte beyond is caught.
    if (posix_memalign(reinterpret_cast<void**>(&base), 16, bytes + shift) != 0) abort();
    memset(base, 0xFF, bytes + shift);
    for (int64_t i = 0; fill && i < count; i++) {
      fill = fill * 1664525 + 1013904223;
      if (size == 4) { const float v = float(int32_t(fill)) * 4e-10f + 0.25f; memcpy(base + shift + 4 * i, &v, 4); }
      else { const uint16_t v = 0x3c00 | (fill >> 16 & 0x81ff); memcpy(base + shift + 2 * i, &v, 2); }   // about +-1 as half or bfloat16
    }
  }
  Array(const Array&) = delete;
  ~Array() { free(base); }
  template <class T> T* as() const { return reinterpret_cast<T*>(base + shift); }
  operator float*() const { return as<float>(); }
};

// Counts elements that are still NaN or have become it.
inline int unwritten(const char* name, const Array& a, int64_t count, int64_t dtype) {
  int bad = 0;
  for (int64_t i = 0; i < count; i++) {
    if (dtype == 0) { bad += a.as<float>()[i] != a.as<float>()[i]; continue; }
    const int bits = a.as<uint16_t>()[i] & 0x7fff;
    bad += bits > (dtype == 1 ? 0x7c00 : 0x7f80);
  }
  if (bad) fprintf(stderr, "value: %s: %d of %ld elements are NaN\n", name, bad, (long)count);
  return bad;
}
