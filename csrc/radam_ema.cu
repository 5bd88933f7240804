// One optimizer step over flat fp32 arenas (formulas: kernels/ect_kernels/radam_ema.py). Three launches:
//   check   reads the gradients: non-finite count and sum of squares of each chunk; cleans the rare non-finite values
//   scalars one block adds the chunks up in a fixed order, computes the fp64 scalars once and moves the state on
//   update  one pass over everything else
// The scalar kernel stands between the two passes because every block of the update needs the whole sum, and the step count
// must change after all of them have read it: inside the update that would take atomics or a grid-wide wait.
#include "access.cuh"
#include "advance.h"
#include "launchers.h"

namespace {
constexpr int THREADS = 256, CHUNK = 16384;   // CHUNK: as in radam_ema.py
constexpr int FIRST_EMAS = 2;   // averages that are read with the rest: registers for more would cost an SM its third block
constexpr float BOUND = 1e5f;

struct Arenas {
  float *params, *grads, *exp_avg, *exp_avg_sq, *ema[MAX_EMAS];
  void* shadow;
};

__device__ __forceinline__ float clean(float x, int& bad) {
  if (fabsf(x) < INFINITY) return x;
  bad++;
  return x > 0.f ? BOUND : x < 0.f ? -BOUND : 0.f;
}

// torch.lerp: exact at both ends.
__device__ __forceinline__ float lerp(float a, float b, float w) {
  return w < 0.5f ? a + w * (b - a) : b - (b - a) * (1.f - w);
}

// (a, b) of all threads added up in a fixed order; thread 0 has the sums.
__device__ __forceinline__ void block_sum(double& a, double& b) {
  SHARED(double, sums, [2][THREADS]);
  const int i = threadIdx.x;
  sums[0][i] = a; sums[1][i] = b;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) { sums[0][i] += sums[0][i + half]; sums[1][i] += sums[1][i + half]; }
  }
  a = sums[0][i]; b = sums[1][i];
}

__global__ void __launch_bounds__(THREADS) radam_ema_check_kernel(float* grads, double* partials, int64_t n) {
  const int64_t base = (int64_t)blockIdx.x * CHUNK;
  float sum = 0.f;
  int bad = 0;
  for (int k = 0; k < CHUNK; k += 16 * THREADS) {
    float4 g[4];   // all loads before the first store, which the compiler could not move them over
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t i = base + k + 4 * (j * THREADS + (int)threadIdx.x);   // n is a multiple of 8
      g[j] = i < n ? *reinterpret_cast<const float4*>(grads + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int before = bad;
      float4& v = g[j];
      v.x = clean(v.x, bad); v.y = clean(v.y, bad); v.z = clean(v.z, bad); v.w = clean(v.w, bad);
      if (bad != before) *reinterpret_cast<float4*>(grads + base + k + 4 * (j * THREADS + (int)threadIdx.x)) = v;
      sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
  }
  double total = sum, count = bad;
  block_sum(total, count);
  if (threadIdx.x == 0) { partials[blockIdx.x] = total; partials[gridDim.x + blockIdx.x] = count; }
}

__global__ void __launch_bounds__(THREADS)
    radam_ema_scalars_kernel(const double* partials, int64_t blocks, double* f, int64_t* s, float* c) {
  double squares = 0, bad = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += THREADS) { squares += partials[i]; bad += partials[blocks + i]; }
  block_sum(squares, bad);
  if (threadIdx.x == 0) advance(f, s, c, squares, int64_t(bad));
}

__device__ __forceinline__ uint2 to_half4(const float* x, bool bf16) {
  union { uint2 bits; __half h[4]; __nv_bfloat16 b[4]; } u;
#pragma unroll
  for (int k = 0; k < 4; k++)
    if (bf16) u.b[k] = from_float<__nv_bfloat16>(x[k]); else u.h[k] = from_float<__half>(x[k]);
  return u.bits;
}

// A warp takes 256 elements: lane l the vectors at 4 l and 128 + 4 l, so that every access of the warp is one run of memory.
__global__ void __launch_bounds__(THREADS, 3)
    radam_ema_update_kernel(Arenas arena, const float* coefficients, int bf16, int64_t n) {
  float c[EMA_WEIGHT0 + MAX_EMAS];
#pragma unroll
  for (int k = 0; k < EMA_WEIGHT0 + MAX_EMAS; k++) c[k] = coefficients[k];
  if (c[GO] == 0.f) return;   // all threads alike
  const int lane = threadIdx.x & 31;
  const int64_t first = (int64_t(blockIdx.x) * THREADS + (threadIdx.x & ~31)) * 8 + 4 * lane;
  union V { float4 v; float e[4]; };
  V p[2], g[2], m[2], v[2], ema[MAX_EMAS][2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t i = first + 128 * h;
    if (i >= n) continue;
    p[h].v = *reinterpret_cast<const float4*>(arena.params + i);
    g[h].v = *reinterpret_cast<const float4*>(arena.grads + i);
    m[h].v = *reinterpret_cast<const float4*>(arena.exp_avg + i);
    v[h].v = *reinterpret_cast<const float4*>(arena.exp_avg_sq + i);
#pragma unroll
    for (int a = 0; a < FIRST_EMAS; a++)
      if (arena.ema[a]) ema[a][h].v = *reinterpret_cast<const float4*>(arena.ema[a] + i);
  }
  uint2 half[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t i = first + 128 * h;
    if (i >= n) continue;
#pragma unroll
    for (int a = FIRST_EMAS; a < MAX_EMAS; a++)
      if (arena.ema[a]) ema[a][h].v = *reinterpret_cast<const float4*>(arena.ema[a] + i);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      g[h].e[k] *= c[SHRINK];
      const float used = g[h].e[k] * c[UNSCALE];
      m[h].e[k] = lerp(m[h].e[k], used, c[WEIGHT1]);
      v[h].e[k] = c[BETA2_F] * v[h].e[k] + c[WEIGHT2] * used * used;
      const float denominator = c[SLOPE] == 0.f ? 1.f : sqrtf(v[h].e[k]) * c[SLOPE] + c[FLOOR];
      p[h].e[k] -= c[SIZE] * (m[h].e[k] / denominator);
#pragma unroll
      for (int a = 0; a < MAX_EMAS; a++)
        if (arena.ema[a]) ema[a][h].e[k] = lerp(ema[a][h].e[k], p[h].e[k], c[EMA_WEIGHT0 + a]);
    }
    *reinterpret_cast<float4*>(arena.params + i) = p[h].v;
    *reinterpret_cast<float4*>(arena.exp_avg + i) = m[h].v;
    *reinterpret_cast<float4*>(arena.exp_avg_sq + i) = v[h].v;
    if (c[SHRINK] != 1.f) *reinterpret_cast<float4*>(arena.grads + i) = g[h].v;
#pragma unroll
    for (int a = 0; a < MAX_EMAS; a++)
      if (arena.ema[a]) *reinterpret_cast<float4*>(arena.ema[a] + i) = ema[a][h].v;
    half[h] = to_half4(p[h].e, bf16);
  }
  if (!arena.shadow) return;   // all threads alike
  // A pair of lanes has twice four halves in each of two places: it swaps four, and each lane stores eight.
  const bool odd = lane & 1;
  const uint2 send = odd ? half[0] : half[1], keep = odd ? half[1] : half[0];
  const uint2 got = make_uint2(__shfl_xor_sync(~0u, send.x, 1), __shfl_xor_sync(~0u, send.y, 1));
  const uint4 out = odd ? make_uint4(got.x, got.y, keep.x, keep.y) : make_uint4(keep.x, keep.y, got.x, got.y);
  const int64_t i = odd ? first - 4 + 128 : first;
  if (i < n) *reinterpret_cast<uint4*>(static_cast<uint16_t*>(arena.shadow) + i) = out;
}
}  // namespace

// Arenas of n elements (a multiple of 8), fp32 and 16-byte aligned; ema0..3 and shadow may be null; half: dtype code of the
// shadow. partials: 2 * blocks doubles, blocks = ceil(n / CHUNK); coefficients: 16 floats; both scratch.
extern "C" int radam_ema_fwd(void* params, void* grads, void* exp_avg, void* exp_avg_sq, void* ema0, void* ema1, void* ema2,
                             void* ema3, void* shadow, int64_t half, void* state_f64, void* state_i64, void* partials,
                             int64_t blocks, void* coefficients, int64_t n, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  const bool aligned = aligned16({params, grads, exp_avg, exp_avg_sq, ema0, ema1, ema2, ema3, shadow});
  if (n < 0 || n % 8 || !aligned || blocks != (n + CHUNK - 1) / CHUNK || (shadow && half != F16 && half != BF16) ||
      n > (int64_t(1) << 40))
    return cudaErrorInvalidValue;
  auto* p = static_cast<double*>(partials);
  auto* c = static_cast<float*>(coefficients);
  if (n > 0) LAUNCH(radam_ema_check_kernel, dim3(unsigned(blocks)), dim3(THREADS), 0, stream, static_cast<float*>(grads), p, n);
  LAUNCH(radam_ema_scalars_kernel, dim3(1), dim3(THREADS), 0, stream, p, blocks, static_cast<double*>(state_f64),
         static_cast<int64_t*>(state_i64), c);
  const Arenas arena = {static_cast<float*>(params), static_cast<float*>(grads), static_cast<float*>(exp_avg),
                        static_cast<float*>(exp_avg_sq),
                        {static_cast<float*>(ema0), static_cast<float*>(ema1), static_cast<float*>(ema2),
                         static_cast<float*>(ema3)}, shadow};
  const int64_t grid = (n + 8 * THREADS - 1) / (8 * THREADS);
  if (n > 0) LAUNCH(radam_ema_update_kernel, dim3(unsigned(grid)), dim3(THREADS), 0, stream, arena, c, int(half == BF16), n);
  return cudaGetLastError();
}
