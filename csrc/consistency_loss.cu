// Loss of each sample and its gradient at F_t, in one launch (formulas: kernels/ect_kernels/consistency_loss.py).
//
// A block owns a sample: it sums the squared differences, then scales them to the gradient. They stay in shared memory in between,
// where each thread finds what it wrote itself; samples too large for that are read a second time.
#include "access.cuh"
#include "shared.cuh"
#include "launchers.h"

namespace {
constexpr int THREADS = 256, STATIC = THREADS / 32 * int(sizeof(float));   // STATIC: shared memory beside the sample

struct Loss {
  const void *F_t, *F_r; const float *x_t, *x_r, *t, *r, *weight;
  float* loss; void* dF;
  int m, resident;         // values of a sample; whether they fit into shared memory
  float c, sd, variance;   // sd: sigma_data, variance: its square
};

template <class T, int V> __global__ void __launch_bounds__(THREADS) consistency_loss_fwd_kernel(Loss a) {
  SHARED_DYN(float, tile);
  SHARED(float, sums, [THREADS / 32]);
  const int64_t n = blockIdx.x, base = n * a.m;
  const float t = a.t[n], r = a.r[n], total_t = t * t + a.variance, total_r = r * r + a.variance;
  const float skip_t = a.variance / total_t, out_t = t * a.sd / sqrtf(total_t);
  const float skip_r = a.variance / total_r, out_r = r * a.sd / sqrtf(total_r);
  const bool has_teacher = r > 0.f;
  const int step = blockDim.x * V;

  auto difference = [&](int i, float (&d)[V]) {   // D_t - target
    float x[V], target[V];
    load<true>(static_cast<const T*>(a.F_t) + base + i, d);
    load<true>(a.x_t + base + i, x);
    load<true>(a.x_r + base + i, target);
    if (has_teacher) {
      float f[V];
      load<true>(static_cast<const T*>(a.F_r) + base + i, f);
#pragma unroll
      for (int k = 0; k < V; k++) target[k] = skip_r * target[k] + out_r * f[k];
    }
#pragma unroll
    for (int k = 0; k < V; k++) d[k] = skip_t * x[k] + out_t * d[k] - target[k];
  };

  float s = 0.f;
  for (int i = threadIdx.x * V; i < a.m; i += step) {
    float d[V];
    difference(i, d);
#pragma unroll
    for (int k = 0; k < V; k++) s += d[k] * d[k];
    if (a.resident) store(tile + i, d);
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
  __syncthreads();
  s = 0.f;
  for (int warp = 0; warp < (int)blockDim.x / 32; warp++) s += sums[warp];

  const float radicand = s + a.c * a.c, root = radicand == 0.f ? 1.f : sqrtf(radicand), weight = a.weight[n];
  if (threadIdx.x == 0) a.loss[n] = weight * (s / (root + a.c));
  const float slope = weight * out_t / root + (s - s);   // s - s: 0, or NaN where s overflowed
  for (int i = threadIdx.x * V; i < a.m; i += step) {
    float d[V];
    if (a.resident) load<false>(tile + i, d); else difference(i, d);
#pragma unroll
    for (int k = 0; k < V; k++) d[k] *= slope;
    store(static_cast<T*>(a.dF) + base + i, d);
  }
}

template <class T, int V> int start(Loss a, int64_t n, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  int threads = 32;
  while (threads < THREADS && threads * V < a.m) threads *= 2;
  const int bytes = a.resident ? 4 * a.m : 0;
  const auto kernel = consistency_loss_fwd_kernel<T, V>;
  const cudaError_t error = allow_shared(kernel, STATIC);
  if (error != cudaSuccess) return (int)error;
  LAUNCH(kernel, dim3(unsigned(n)), dim3(threads), bytes, stream, a);
  return (int)cudaGetLastError();
}

template <class T> int start(const Loss& a, int64_t n, void* stream) {
  constexpr int V = Vec<T>::N;
  const bool vector = aligned16({a.F_t, a.F_r, a.x_t, a.x_r, a.dF}) && a.m % V == 0;
  return vector ? start<T, V>(a, n, stream) : start<T, 1>(a, n, stream);
}
}  // namespace

// F_t, F_r, dF (of `dtype`), x_t, x_r: [n, m], the same order of values in all; t, r, weight, loss: [n].
extern "C" int consistency_loss_fwd(const void* F_t, const void* F_r, const float* x_t, const float* x_r, const float* t, const float* r,
                                    const float* weight, float* loss, void* dF, int64_t n, int64_t m, int64_t dtype, double c,
                                    double sigma_data, void* stream) {
  if (n < 0 || n > INT32_MAX || m < 1 || m >= (1 << 28)) return (int)cudaErrorInvalidValue;
  if (n == 0) return (int)cudaSuccess;
  const bool resident = 4 * m + STATIC <= half_shared();
  const Loss a = {F_t, F_r, x_t, x_r, t, r, weight, loss, dF, int(m), resident, float(c), float(sigma_data),
                  float(sigma_data * sigma_data)};
  BY_DTYPE(dtype, return start<T>(a, n, stream));
  return (int)cudaErrorInvalidValue;
}
