// Noise levels of training pairs, the U-Net's labels of them, and flips; formulas: kernels/ect_kernels/levels.py.
#include "philox.cuh"
#include "launchers.h"

namespace {
constexpr int THREADS = 128;
constexpr uint32_t STREAM_T = 0xfffffffeu, STREAM_FLIP = 0xfffffffdu;   // philox.STREAM_T, philox.STREAM_FLIP

struct Levels {
  const int64_t *seed, *stage, *n0;
  float *t, *r, *label_t, *label_r; uint8_t* flip;
  int64_t n;
  float mean, std; double q; float k, b;
};

// A thread to a sample.
__global__ void __launch_bounds__(THREADS) levels_fwd_kernel(Levels a) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= a.n) return;
  const uint64_t seed = (uint64_t)*a.seed;
  const uint32_t counter = uint32_t((a.n0 ? *a.n0 : 0) + i);
  float z[4];
  normal4(philox(seed, counter, STREAM_T), z);
  const float t = expf(a.mean + a.std * z[0]), decay = float(pow(a.q, -double(*a.stage + 1)));
  const float r = fmaxf(t * (1.f - decay * (1.f + a.k / (1.f + expf(a.b * t)))), 0.f);
  a.t[i] = t; a.label_t[i] = logf(t) / 4;
  a.r[i] = r; a.label_r[i] = logf(r > 0.f ? r : 1.f) / 4;
  a.flip[i] = philox(seed, counter, STREAM_FLIP).x >> 31 == 0;   // uniform < 1/2
}
}  // namespace

extern "C" int levels_fwd(const int64_t* seed, const int64_t* stage, const int64_t* n0, float* t, float* r, float* label_t, float* label_r,
                          uint8_t* flip, int64_t n, double mean, double std, double q, double k, double b, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  if (n < 1 || n > INT32_MAX || !(q > 1)) return (int)cudaErrorInvalidValue;
  const Levels a = {seed, stage, n0, t, r, label_t, label_r, flip, n, float(mean), float(std), q, float(k), float(b)};
  LAUNCH(levels_fwd_kernel, dim3(unsigned((n + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream, a);
  return (int)cudaGetLastError();
}

#if defined(__CUDACC__)
// Loads the smallest kernel on the current device: an error of the driver, or of a GPU that this library has no code for, shows here.
extern "C" int probe(void) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, levels_fwd_kernel);
  cudaGetLastError();   // or the next launch would report it
  return (int)error;
}
#endif
