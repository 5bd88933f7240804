// group_norm_silu: y = dropout(silu(GN(x + v[n,c]) * gamma + beta, then (1 + scale[n,c]) and + shift[n,c])), channels-last.
// DRAM traffic in tensor sizes s: forward 2s, backward 3s where the slab stays in shared memory, else 3s and 5s.
#include "gn_backward.cuh"
#include "gn_forward.cuh"

template <class T, int V> __global__ void __launch_bounds__(gn::THREADS, 3) group_norm_silu_fwd_kernel(const gn::Forward f) {
  gn::forward<T, V, false>(f);
}
template <class T, int V> __global__ void __launch_bounds__(gn::THREADS, 2) group_norm_silu_bwd_kernel(const gn::Backward f) {
  gn::backward<T, V, false>(f);
}

extern "C" int group_norm_silu_fwd(const void* x, const float* gamma, const float* beta, const float* v, const float* scale,
    const float* shift, const int64_t* seed, const int64_t* n0, void* y, float* mean, float* rstd, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_rows, int64_t rows, double eps, double inv_keep, void* stream) {
  gn::Forward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, scale, shift, v, v_rows, rows};
  f.act = act != 0; f.eps = float(eps);
  f.x = x; f.y = y; f.mean = mean; f.rstd = rstd;
  if (!gn::layout(f.p, n, hw, c, 0, groups, gn::dtype_size(dtype), 1, 2, aligned16({x, y}))) return (int)cudaErrorInvalidValue;
  BY_DTYPE(dtype, return f.p.vector ? gn::start(group_norm_silu_fwd_kernel<T, 8>, f, n, stream)
                                    : gn::start(group_norm_silu_fwd_kernel<T, 1>, f, n, stream));
}

extern "C" int group_norm_silu_bwd(const void* dy, const void* x, const float* gamma, const float* beta, const float* v,
    const float* scale, const float* shift, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* dx, float* dv, float* dscale, float* dshift, float* partials, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_rows, int64_t rows, double inv_keep, void* stream) {
  gn::Backward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, scale, shift, v, v_rows, rows};
  f.act = act != 0; f.n = n;
  f.dy = dy; f.x = x; f.mean = mean; f.rstd = rstd;
  f.dx = dx; f.dv = dv; f.dscale = dscale; f.dshift = dshift; f.partials = partials;
  if (!gn::layout(f.p, n, hw, c, 0, groups, gn::dtype_size(dtype), 2, 3, aligned16({dy, x, dx}))) return (int)cudaErrorInvalidValue;
  auto run = [&](auto* kernel) { return gn::start(kernel, f, n, stream); };
  int error = 0;
  BY_DTYPE(dtype, error = f.p.vector ? run(group_norm_silu_bwd_kernel<T, 8>) : run(group_norm_silu_bwd_kernel<T, 1>));
  return error;
}
