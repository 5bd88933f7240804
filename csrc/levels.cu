// Noise levels of training pairs and the U-Net's labels of them; formulas: kernels/ect_kernels/levels.py. A thread to a sample.
#include "cuda_compat.h"
#include <math.h>
#include <stdint.h>

namespace {
constexpr int THREADS = 128;

struct Levels {
  const float* normal; const int64_t* stage;
  float *t, *r, *label_t, *label_r;
  int64_t n;
  float mean, std; double q; float k, b;
};

__global__ void __launch_bounds__(THREADS) levels_fwd_kernel(Levels a) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= a.n) return;
  const float t = expf(a.mean + a.std * a.normal[i]), decay = float(pow(a.q, -double(*a.stage + 1)));
  const float r = fmaxf(t * (1.f - decay * (1.f + a.k / (1.f + expf(a.b * t)))), 0.f);
  a.t[i] = t; a.label_t[i] = logf(t) / 4;
  a.r[i] = r; a.label_r[i] = logf(r > 0.f ? r : 1.f) / 4;
}
}  // namespace

extern "C" int levels_fwd(const float* normal, const int64_t* stage, float* t, float* r, float* label_t, float* label_r, int64_t n,
                          double mean, double std, double q, double k, double b, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  if (n < 0 || n > INT32_MAX || !(q > 1)) return (int)cudaErrorInvalidValue;
  if (n == 0) return (int)cudaSuccess;
  const Levels a = {normal, stage, t, r, label_t, label_r, n, float(mean), float(std), q, float(k), float(b)};
  LAUNCH(levels_fwd_kernel, dim3(unsigned((n + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream, a);
  return (int)cudaGetLastError();
}
