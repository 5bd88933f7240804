// Runs of V elements between memory and registers: as 16-byte vectors (V a multiple of Vec<T>::N), or one element at a time (V = 1).
#pragma once
#include "vec.cuh"
#include <initializer_list>

constexpr int64_t SHARED_BYTES = 80 << 10;   // of a block that keeps its tile on chip: two blocks on an SM of 164 KB

// CONSTANT: p is in global memory and nothing in this launch writes there, so the load may move over stores.
template <bool CONSTANT, class T, int V> __device__ __forceinline__ void load(const T* p, float (&f)[V]) {
  if constexpr (V == 1) {
    f[0] = to_float(*p);
  } else {
    constexpr int N = Vec<T>::N;
#pragma unroll
    for (int h = 0; h < V / N; h++) {
      float part[N];
      const uint4* from = reinterpret_cast<const uint4*>(p) + h;
      unpack<T>(CONSTANT ? __ldg(from) : *from, part);
#pragma unroll
      for (int j = 0; j < N; j++) f[h * N + j] = part[j];
    }
  }
}
// GLOBAL: p is in global memory for certain, and the store streams: it stays whole, where a plain one nvcc may split. Never for
// shared memory, which `st.global` does not reach.
template <bool GLOBAL = false, class T, int V> __device__ __forceinline__ void store(T* p, const float (&f)[V]) {
  if constexpr (V == 1) {
    *p = from_float<T>(f[0]);
  } else {
    constexpr int N = Vec<T>::N;
#pragma unroll
    for (int h = 0; h < V / N; h++) {
      float part[N];
#pragma unroll
      for (int j = 0; j < N; j++) part[j] = f[h * N + j];
      uint4* to = reinterpret_cast<uint4*>(p) + h;
      if constexpr (GLOBAL) __stcs(to, pack<T>(part)); else *to = pack<T>(part);
    }
  }
}

inline bool aligned16(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return all % 16 == 0;
}
