// What the CPU form of every op is made of: launchers, threads, dtypes, sums, elementary functions, random bits.
//
// The loops are plain C++ that compilers turn into vector instructions, once for each instruction set (csrc/cpu/build.py): no
// branch in a loop over elements, no call that cannot be inlined, restrict where memory is written. A value depends on the
// instruction set, since it may have fused multiply-adds, but on nothing else: threads share out whole samples, or chunks of a
// fixed size, and whatever is summed is summed in one order.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#pragma GCC visibility push(default)
#include "launchers.h"   // the declarations, for both forms; here the stream is the number of threads
#pragma GCC visibility pop

#define RESTRICT __restrict__
#ifndef GRAIN
#define GRAIN 65536   // values that make a thread worth its start, which takes as long as some ten thousand of them
#endif

// Calls run(begin, end) for ranges that make up [0, items), each in a thread of its own; `size`: values of an item.
template <class F> void parallel(const void* threads, int64_t items, int64_t size, const F& run) {
  const int64_t wanted = std::min<int64_t>(reinterpret_cast<intptr_t>(threads), items);
  const int64_t parts = std::max<int64_t>(std::min(wanted, items * size / GRAIN), 1);
  const auto part = [&](int64_t i) { run(items * i / parts, items * (i + 1) / parts); };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < parts; i++) others.emplace_back(part, i);
  } catch (const std::system_error&) {}   // no more threads to be had: the rest runs here
  const int64_t begun = int64_t(others.size());
  part(0);
  for (int64_t i = begun + 1; i < parts; i++) part(i);
  for (std::thread& other : others) other.join();
}

// dtype codes of the launchers (native.DTYPES in Python), and the memory of a value; arithmetic is in fp32.
enum DType { F32 = 0, F16 = 1, BF16 = 2 };
struct Half { uint16_t bits; };
struct Brain { uint16_t bits; };

inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

inline float to_float(float x) { return x; }
inline float to_float(Brain x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);   // moves the exponent, and makes subnormals normal
  return float_of((magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : finite) | sign);
}
// Rounds to the nearest, to even where two are as near.
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline Brain from_float<Brain>(float x) {
  const uint32_t b = bits_of(x);
  return {uint16_t((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (b + 0x7fffu + (b >> 16 & 1)) >> 16)};
}
template <> inline Half from_float<Half>(float x) {
  const uint32_t b = bits_of(x), a = b & 0x7fffffffu;
  const uint32_t normal = (a - (112u << 23) + 0xfffu + (a >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000u;   // 0.5 has the last bit where the largest of them has it
  const uint32_t finite = a < 113u << 23 ? subnormal : normal < 0x7c00u ? normal : 0x7c00u;
  return {uint16_t((a > 0x7f800000u ? 0x7e00u : a >= 0x47800000u ? 0x7c00u : finite) | (b >> 16 & 0x8000u))};
}

// Runs the statement with `type T` bound to the element type of a dtype code.
#define BY_DTYPE(code, ...) \
  switch (code) { case F32: { using T = float; __VA_ARGS__; break; } case F16: { using T = Half; __VA_ARGS__; break; } \
    case BF16: { using T = Brain; __VA_ARGS__; break; } default: return 1; }

// The sum of value(i) for i < n, in one order: as many sums side by side as the widest vector has numbers.
template <class F> float sum(int64_t n, const F& value) {
  constexpr int LANES = 16;
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int k = 0; k < LANES; k++) lanes[k] += value(i + k);
  for (int k = 0; i + k < n; k++) lanes[k] += value(i + k);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
  return lanes[0];
}

// The nearest whole number, for |x| < 2^22; to even where two are as near.
inline float nearest(float x) { return x + 12582912.f - 12582912.f; }

// e^x to about an ulp.
inline float exponential(float x) {
  const float limited = x < -104.f ? -104.f : x > 89.f ? 89.f : x;   // to 0 and infinity; NaN: itself
  const float n = nearest(limited * 1.44269504f), r = limited - n * 0.693359375f + n * 2.12194440e-4f;   // x = n ln 2 + r
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
  const int32_t power = int32_t(n), half = power >> 1;   // in two factors, for 2^n may be no normal number
  return (p * r * r + r + 1.f) * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(power - half + 127) << 23);
}
inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

// ln x to about an ulp, of normal x > 0.
inline float logarithm(float x) {
  const uint32_t b = bits_of(x) - 0x3f3504f3u;   // from sqrt(1/2) on
  const float n = float(int32_t(b) >> 23), m = float_of((b & 0x7fffffu) + 0x3f3504f3u) - 1.f;   // x = 2^n (1 + m)
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f; p = p * m + 1.1676998740e-1f; p = p * m - 1.2420140846e-1f; p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f; p = p * m + 2.0000714765e-1f; p = p * m - 2.4999993993e-1f; p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  return m + (p * m * square - n * 2.12194440e-4f - 0.5f * square) + n * 0.693359375f;
}

// cos and sin of 0 <= x <= 7 to about an ulp of 1.
inline void turn(float x, float& cosine, float& sine) {
  const float n = nearest(x * 0.636619772f), r = x - n * 1.5703125f - n * 4.83751297e-4f - n * 7.54978942e-8f;   // x = n pi/2 + r
  const float z = r * r;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.f;
  const int32_t quarter = int32_t(n);
  const float x_part = quarter & 1 ? s : c, y_part = quarter & 1 ? c : s;
  cosine = (quarter + 1) & 2 ? -x_part : x_part;
  sine = quarter & 2 ? -y_part : y_part;
}

// 64-bit lanes of the widest vector, and of two their products of the lower halves: compilers make no such product of plain loops.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes product(Lanes a, Lanes b) { return Lanes(_mm512_mul_epu32(__m512i(a), __m512i(b))); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) { return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes product(Lanes a, Lanes b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif

// Philox4x32-10, the same bits as ect_kernels/philox.py: words[4 i ... 4 i + 3] of the counters (first + i, stream, 0, 0). A lane
// has a counter's word in its lower half; what lies in the upper one is never read.
inline void philox(uint64_t seed, uint32_t first, uint32_t stream, int64_t count, uint32_t* RESTRICT words) {
  constexpr int W = sizeof(Lanes) / 8;
  for (int64_t i = 0; i < count; i += W) {
    Lanes c0, c1 = Lanes{} + stream, c2 = {}, c3 = {};
    for (int j = 0; j < W; j++) c0[j] = first + uint32_t(i) + uint32_t(j);
    uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++, a += 0x9E3779B9u, b += 0xBB67AE85u) {
      const Lanes p = product(c0, Lanes{} + 0xD2511F53u), q = product(c2, Lanes{} + 0xCD9E8D57u);
      c0 = (q >> 32) ^ c1 ^ a; c1 = q;
      c2 = (p >> 32) ^ c3 ^ b; c3 = p;
    }
    const Lanes low = (c0 & 0xffffffffu) | c1 << 32, high = (c2 & 0xffffffffu) | c3 << 32;
    uint64_t both[2 * W];
    for (int j = 0; j < W; j++) { both[2 * j] = low[j]; both[2 * j + 1] = high[j]; }
    std::memcpy(words + 4 * i, both, size_t(16 * std::min<int64_t>(W, count - i)));
  }
}

// Uniform in (0, 1].
inline float uniform(uint32_t word) { return (float(word >> 8) + 0.5f) * 0x1p-24f; }

// Standard normal z[2 i], z[2 i + 1] of words 2 i and 2 i + 1, by Box-Muller as philox.normal has it.
inline void normal(const uint32_t* RESTRICT words, int64_t pairs, float* RESTRICT z) {
  for (int64_t i = 0; i < pairs; i++) {
    const float radius = std::sqrt(-2.f * logarithm(uniform(words[2 * i])));
    float cosine, sine;
    turn(6.2831855f * uniform(words[2 * i + 1]), cosine, sine);
    z[2 * i] = radius * cosine; z[2 * i + 1] = radius * sine;
  }
}

// Dropout of `count` values from element `start` of the global batch on: what each is multiplied by, 0 or inv_keep.
// words: room for count / 2 + 8 numbers.
inline void dropout(uint64_t seed, uint32_t layer, uint64_t start, int64_t count, uint32_t threshold, float inv_keep,
                    uint32_t* RESTRICT words, float* RESTRICT factor) {
  const int64_t skipped = int64_t(start % 8);
  philox(seed, uint32_t(start / 8), layer, (skipped + count + 7) / 8, words);
  const char* halves = reinterpret_cast<const char*>(words) + 2 * skipped;   // in memory the low half of a word is the first
  for (int64_t i = 0; i < count; i++) {
    uint16_t half;
    std::memcpy(&half, halves + 2 * i, 2);
    factor[i] = half >= threshold ? inv_keep : 0.f;
  }
}
