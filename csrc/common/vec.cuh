// 16-byte vectors of float, half and bfloat16, and their conversion to and from fp32.
#pragma once
#include "cuda_compat.h"
#include <stdint.h>

// dtype codes of the launchers: 0 float, 1 half, 2 bfloat16 (native.DTYPES in Python).
enum DType { F32 = 0, F16 = 1, BF16 = 2 };

template <class T> struct Vec;   // VEC elements of T are one 128-bit access
template <> struct Vec<float> { static constexpr int N = 4; };
template <> struct Vec<__half> { static constexpr int N = 8; };
template <> struct Vec<__nv_bfloat16> { static constexpr int N = 8; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> __device__ __forceinline__ void unpack(const uint4& v, float (&f)[Vec<T>::N]) {
  union { uint4 v; T e[Vec<T>::N]; } p; p.v = v;
#pragma unroll
  for (int i = 0; i < Vec<T>::N; i++) f[i] = to_float(p.e[i]);
}
template <class T> __device__ __forceinline__ uint4 pack(const float (&f)[Vec<T>::N]) {
  union { uint4 v; T e[Vec<T>::N]; } p;
#pragma unroll
  for (int i = 0; i < Vec<T>::N; i++) p.e[i] = from_float<T>(f[i]);
  return p.v;
}

// 2^x and 1 / x by one instruction each, to about an ulp; results too small for a normal number are 0.
#if defined(__CUDACC__)
__device__ __forceinline__ float fast_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float fast_inverse(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#else
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_inverse(float x) { return 1.f / x; }
#endif
// sigmoid(z) / keep
__device__ __forceinline__ float sigmoid(float z, float keep = 1.f) {
  return fast_inverse(fmaf(fast_exp2(z * -1.4426950408889634f), keep, keep));
}

// Runs the statement with `type T` bound to the element type of a dtype code; returns cudaErrorInvalidValue on an unknown one.
#define BY_DTYPE(code, ...) \
  switch (code) { case F32: { using T = float; __VA_ARGS__; break; } case F16: { using T = __half; __VA_ARGS__; break; } \
    case BF16: { using T = __nv_bfloat16; __VA_ARGS__; break; } default: return (int)cudaErrorInvalidValue; }
