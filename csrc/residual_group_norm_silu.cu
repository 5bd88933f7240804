// residual_group_norm_silu: x = (a + bias[c] + skip_bias[c] + skip) * skip_scale, written unless a is null (x is given), and
// y = dropout(silu(GN(cat(x, other)) * gamma + beta)) in one pass, channels-last; groups may straddle x and other.
// DRAM traffic in tensor sizes s: 4s forward (a, skip, x, y) and backward (dy, x, dx, da) where the slab stays in shared memory.
#include "gn_backward.cuh"
#include "gn_forward.cuh"
#include "launchers.h"

// Runs the statement with A, the type of a, T, that of x (the same, or one of the two float), and V, the channels of a thread: one
// 16-byte vector, or eight elements where the types differ.
#define BY_DTYPES(a_code, x_code, ...) \
  if (a_code == x_code) { BY_DTYPE(x_code, { using A = T; constexpr int V = Vec<T>::N; __VA_ARGS__; }) } \
  MIXED(a_code, x_code, F32, float, F16, __half, __VA_ARGS__) MIXED(a_code, x_code, F32, float, BF16, __nv_bfloat16, __VA_ARGS__) \
  MIXED(a_code, x_code, F16, __half, F32, float, __VA_ARGS__) MIXED(a_code, x_code, BF16, __nv_bfloat16, F32, float, __VA_ARGS__) \
  else return (int)cudaErrorInvalidValue;
#define MIXED(a_code, x_code, OF_A, A_, OF_X, T_, ...) \
  else if (a_code == OF_A && x_code == OF_X) { using A = A_; using T = T_; constexpr int V = 8; __VA_ARGS__; }

template <class A, class T, int V, bool RESIDENT> __global__ void __launch_bounds__(gn::THREADS, 2) residual_group_norm_silu_fwd_kernel(const gn::Forward f) {
  gn::forward<T, V, RESIDENT, true, A>(f);
}
template <class A, class T, int V, bool RESIDENT> __global__ void __launch_bounds__(gn::THREADS, 2) residual_group_norm_silu_bwd_kernel(const gn::Backward f) {
  gn::backward<T, V, RESIDENT, true, A>(f);
}
static int lanes(int64_t a, int64_t x) { return a == F32 && x == F32 ? 4 : 8; }

extern "C" int residual_group_norm_silu_fwd(const void* a, const float* bias, const void* skip, const float* skip_bias,
    const void* other, const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, void* x, void* y, float* mean, float* rstd,
    int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype, int64_t groups, int64_t dtype_of_a, int64_t act,
    int64_t threshold, int64_t layer, double skip_scale, double eps, double inv_keep, void* stream) {
  gn::Forward f{};
  f.drop = gn::drop(seed, n0, threshold, layer, inv_keep);
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.eps = float(eps);
  f.other = other; f.y = y; f.mean = mean; f.rstd = rstd;
  f.a = a; f.skip = skip; f.bias = bias; f.skip_bias = skip_bias; f.x = x; f.x_out = x; f.skip_scale = float(skip_scale);
  const bool aligned = aligned16({a, skip, other, x, y});
  if (!gn::layout(f.p, gn::FORWARD, n, hw, c, c2, groups, gn::dtype_size(dtype), lanes(dtype_of_a, dtype), aligned)) return (int)cudaErrorInvalidValue;
  BY_DTYPES(dtype_of_a, dtype, return f.p.resident ? gn::start(residual_group_norm_silu_fwd_kernel<A, T, V, true>, f, n, stream)
                                    : f.p.lanes > 1 ? gn::start(residual_group_norm_silu_fwd_kernel<A, T, V, false>, f, n, stream)
                                                    : gn::start(residual_group_norm_silu_fwd_kernel<A, T, 1, false>, f, n, stream));
  return (int)cudaErrorInvalidValue;
}

extern "C" int residual_group_norm_silu_bwd(const void* dy, const void* dx, const void* djoined, const void* x, const void* other,
    const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* da, void* dother,
    float* partials, int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype,
    int64_t groups, int64_t dtype_of_a, int64_t act, int64_t threshold, int64_t layer, double skip_scale, double inv_keep, void* stream) {
  gn::Backward f{};
  f.drop = gn::drop(seed, n0, threshold, layer, inv_keep);
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.n = n;
  f.dy = dy; f.x = x; f.other = other; f.mean = mean; f.rstd = rstd;
  f.dx = da; f.dother = dother; f.partials = partials; f.dx_in = dx; f.djoined = djoined; f.skip_scale = float(skip_scale);
  const bool aligned = aligned16({dy, dx, djoined, x, other, da, dother});
  if (!gn::layout(f.p, gn::BACKWARD, n, hw, c, c2, groups, gn::dtype_size(dtype), lanes(dtype_of_a, dtype), aligned)) return (int)cudaErrorInvalidValue;
  auto run = [&](auto* kernel) { return gn::start(kernel, f, n, stream); };
  BY_DTYPES(dtype_of_a, dtype, return f.p.resident ? run(residual_group_norm_silu_bwd_kernel<A, T, V, true>)
                                     : f.p.lanes > 1 ? run(residual_group_norm_silu_bwd_kernel<A, T, V, false>)
                                                     : run(residual_group_norm_silu_bwd_kernel<A, T, 1, false>));
  return (int)cudaErrorInvalidValue;
}
