// residual_group_norm_silu: x = (a + bias[c] + skip_bias[c] + skip) * skip_scale, written unless a is null (x is given), and
// y = dropout(silu(GN(cat(x, other)) * gamma + beta)) in one pass, channels-last; groups may straddle x and other.
// DRAM traffic in tensor sizes s: 4s forward (a, skip, x, y) and backward (dy, x, dx, da) where the slab stays in shared memory.
#include "gn_backward.cuh"
#include "gn_forward.cuh"

// Runs CALL with A, the type of a, and T, that of x: the same, or one of the two float.
#define BY_DTYPES(a_code, x_code, CALL) \
  if (a_code == x_code) { BY_DTYPE(x_code, { using A = T; CALL; }) } \
  else if (a_code == F32) { BY_DTYPE(x_code, { using A = float; CALL; }) } \
  else if (x_code == F32) { BY_DTYPE(a_code, { using A = T; { using T = float; CALL; } }) } \
  else return (int)cudaErrorInvalidValue;

template <class A, class T, int V> __global__ void __launch_bounds__(gn::THREADS, 3) residual_group_norm_silu_fwd_kernel(const gn::Forward f) {
  gn::forward<T, V, true, A>(f);
}
template <class A, class T, int V> __global__ void __launch_bounds__(gn::THREADS, 2) residual_group_norm_silu_bwd_kernel(const gn::Backward f) {
  gn::backward<T, V, true, A>(f);
}

extern "C" int residual_group_norm_silu_fwd(const void* a, const float* bias, const void* skip, const float* skip_bias,
    const void* other, const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, void* x, void* y, float* mean, float* rstd,
    int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype, int64_t groups, int64_t dtype_of_a, int64_t act,
    int64_t threshold, int64_t layer, double skip_scale, double eps, double inv_keep, void* stream) {
  gn::Forward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.eps = float(eps);
  f.other = other; f.y = y; f.mean = mean; f.rstd = rstd;
  f.a = a; f.skip = skip; f.bias = bias; f.skip_bias = skip_bias; f.x = x; f.x_out = x; f.skip_scale = float(skip_scale);
  const bool aligned = aligned16({a, skip, other, x, y});
  if (!gn::layout(f.p, n, hw, c, c2, groups, gn::dtype_size(dtype), 1, 2, aligned)) return (int)cudaErrorInvalidValue;
  BY_DTYPES(dtype_of_a, dtype, return f.p.vector ? gn::start(residual_group_norm_silu_fwd_kernel<A, T, 8>, f, n, stream)
                                                 : gn::start(residual_group_norm_silu_fwd_kernel<A, T, 1>, f, n, stream));
  return (int)cudaErrorInvalidValue;
}

extern "C" int residual_group_norm_silu_bwd(const void* dy, const void* dx, const void* djoined, const void* x, const void* other,
    const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* da, void* dother,
    float* partials, int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype_of_a,
    int64_t groups, int64_t dtype, int64_t act, int64_t threshold, int64_t layer, double skip_scale, double inv_keep, void* stream) {
  gn::Backward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.n = n;
  f.dy = dy; f.x = x; f.other = other; f.mean = mean; f.rstd = rstd;
  f.dx = da; f.dother = dother; f.partials = partials; f.dx_in = dx; f.djoined = djoined; f.skip_scale = float(skip_scale);
  const bool aligned = aligned16({dy, dx, djoined, x, other, da, dother});
  if (!gn::layout(f.p, n, hw, c, c2, groups, gn::dtype_size(dtype), 2, 3, aligned)) return (int)cudaErrorInvalidValue;
  auto run = [&](auto* kernel) { return gn::start(kernel, f, n, stream); };
  int error = 0;
  BY_DTYPES(dtype_of_a, dtype, error = f.p.vector ? run(residual_group_norm_silu_bwd_kernel<A, T, 8>)
                                                  : run(residual_group_norm_silu_bwd_kernel<A, T, 1>));
  return error;
}
