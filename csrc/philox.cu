// Uniform and normal draws as a function of seed and counter: the op of kernels/ect_kernels/philox.py.
#include "philox.cuh"

namespace {
constexpr int THREADS = 128;

struct Draw { const int64_t* seed; float* out; int total, per_sample, calls; uint64_t n0; uint32_t stream; };

// One call of the generator, four values, to a thread.
template <bool GAUSSIAN> __global__ void __launch_bounds__(THREADS) philox_fwd_kernel(Draw d) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= d.total) return;
  const uint4 w = philox((uint64_t)*d.seed, uint32_t(d.n0 * d.calls + i), d.stream);
  float z[4] = {uniform(w.x), uniform(w.y), uniform(w.z), uniform(w.w)};
  if constexpr (GAUSSIAN) normal4(w, z);
  const int first = i % d.calls * 4;
  float* out = d.out + int64_t(i / d.calls) * d.per_sample + first;
#pragma unroll
  for (int k = 0; k < 4; k++) if (first + k < d.per_sample) out[k] = z[k];
}
}  // namespace

// out: [n, per_sample]; n0: global number of the first sample.
extern "C" int philox_fwd(const int64_t* seed, float* out, int64_t n, int64_t per_sample, int64_t n0, int64_t stream_of_draws,
                          int64_t gaussian, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  const int64_t calls = (per_sample + 3) / 4;
  if (n < 0 || per_sample < 0 || (calls && n > (INT32_MAX - THREADS) / calls)) return (int)cudaErrorInvalidValue;
  if (n * calls == 0) return (int)cudaSuccess;
  const Draw d = {seed, out, int(n * calls), int(per_sample), int(calls), uint64_t(n0), uint32_t(stream_of_draws)};
  const dim3 grid(unsigned((d.total + THREADS - 1) / THREADS));
  if (gaussian) LAUNCH((philox_fwd_kernel<true>), grid, dim3(THREADS), 0, stream, d);
  else LAUNCH((philox_fwd_kernel<false>), grid, dim3(THREADS), 0, stream, d);
  return (int)cudaGetLastError();
}
