// The functions of csrc/cpu/cpu.hpp over arrays, for tests/kernels/test_cpu.py.
#include "cpu.hpp"

#pragma GCC visibility push(default)
extern "C" {
void widen_half(const uint16_t* x, float* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = to_float(Half{x[i]}); }
void widen_brain(const uint16_t* x, float* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = to_float(Brain{x[i]}); }
void round_half(const float* x, uint16_t* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = from_float<Half>(x[i]).bits; }
void round_brain(const float* x, uint16_t* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = from_float<Brain>(x[i]).bits; }
void exponentials(const float* x, float* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = exponential(x[i]); }
void logarithms(const float* x, float* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = logarithm(x[i]); }
void sigmoids(const float* x, float* y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = sigmoid(x[i]); }
void cosines(const float* x, float* y, int64_t n) { float s; for (int64_t i = 0; i < n; i++) turn(x[i], y[i], s); }
void sines(const float* x, float* y, int64_t n) { float c; for (int64_t i = 0; i < n; i++) turn(x[i], c, y[i]); }
void normals(const uint32_t* words, float* z, int64_t n) { normal(words, n / 2, z); }
void words(int64_t seed, int64_t first, int64_t stream, int64_t n, uint32_t* out) {
  philox(uint64_t(seed), uint32_t(first), uint32_t(stream), n, out);
}
void factors(int64_t seed, int64_t layer, int64_t start, int64_t n, int64_t threshold, double inv_keep, float* out) {
  std::vector<uint32_t> room(n / 2 + 8);
  dropout(uint64_t(seed), uint32_t(layer), uint64_t(start), n, uint32_t(threshold), float(inv_keep), room.data(), out);
}
float total(const float* x, int64_t n) { return sum(n, [&](int64_t i) { return x[i]; }); }
// How often each of n items was run, on so many threads, and the number of ranges.
int64_t shares(int64_t threads, int64_t n, int64_t size, int64_t* times) {
  std::vector<int64_t> begun(n + 1);
  parallel(reinterpret_cast<void*>(threads), n, size, [&](int64_t begin, int64_t end) {
    begun[begin]++;
    for (int64_t i = begin; i < end; i++) times[i]++;
  });
  int64_t ranges = 0;
  for (int64_t one : begun) ranges += one;
  return ranges;
}
}
#pragma GCC visibility pop
