// Runs of V elements between memory and registers: as 16-byte vectors (V a multiple of Vec<T>::N), or one element at a time (V = 1).
#pragma once
#include "vec.cuh"
#include <initializer_list>

// A run as it lies in memory, for loads that are on their way while the one before is worked on.
template <class T, int V> struct Run { uint4 part[V / Vec<T>::N]; };
template <class T> struct Run<T, 1> { T value; };

// CONSTANT: p is in global memory and nothing in this launch writes there, so the load may move over stores.
template <bool CONSTANT, int V, class T> __device__ __forceinline__ Run<T, V> fetch(const T* p) {
  Run<T, V> run;
  if constexpr (V == 1) {
    run.value = *p;
  } else {
#pragma unroll
    for (int h = 0; h < V / Vec<T>::N; h++) {
      const uint4* from = reinterpret_cast<const uint4*>(p) + h;
      if constexpr (CONSTANT) run.part[h] = __ldg(from); else run.part[h] = *from;
    }
  }
  return run;
}
template <class T, int V> __device__ __forceinline__ void unpack(const Run<T, V>& run, float (&f)[V]) {
  if constexpr (V == 1) {
    f[0] = to_float(run.value);
  } else {
    constexpr int N = Vec<T>::N;
#pragma unroll
    for (int h = 0; h < V / N; h++) {
      float part[N];
      unpack<T>(run.part[h], part);
#pragma unroll
      for (int j = 0; j < N; j++) f[h * N + j] = part[j];
    }
  }
}
template <bool CONSTANT, class T, int V> __device__ __forceinline__ void load(const T* p, float (&f)[V]) {
  unpack<T, V>(fetch<CONSTANT, V>(p), f);
}

// One 16-byte store to global memory that stays whole, where a plain one nvcc may split. Written back like any other, which is what
// no cache operator says (ptxas makes a strong store of `.wb`): the next convolution reads at once what a norm has written.
#if defined(__CUDACC__)
__device__ __forceinline__ void store16(uint4* global, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#else
inline void store16(uint4* global, const uint4& v, CH_LOC) { cuda_host::check_space(global, false, loc); *global = v; }
#endif
// GLOBAL: p is in global memory for certain. Never for shared memory, which `st.global` does not reach.
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
      if constexpr (GLOBAL) store16(to, pack<T>(part)); else *to = pack<T>(part);
    }
  }
}

inline bool aligned16(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return all % 16 == 0;
}
