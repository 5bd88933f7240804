// group_norm_silu: y = dropout(silu(GN(x + v[n,c]) * gamma + beta, then (1 + scale[n,c]) and + shift[n,c])), channels-last.
// DRAM traffic in tensor sizes s: forward 2s, backward 3s where the slab stays in shared memory, else 3s and 5s.
#include "gn_backward.cuh"
#include "gn_forward.cuh"
#include "launchers.h"

template <class T, int V, bool RESIDENT> __global__ void __launch_bounds__(gn::THREADS, 2) group_norm_silu_fwd_kernel(const gn::Forward f) {
  gn::forward<T, V, RESIDENT, false>(f);
}
template <class T, int V, bool RESIDENT> __global__ void __launch_bounds__(gn::THREADS, 2) group_norm_silu_bwd_kernel(const gn::Backward f) {
  gn::backward<T, V, RESIDENT, false>(f);
}

extern "C" int group_norm_silu_fwd(const void* x, const float* gamma, const float* beta, const float* v, const float* scale,
    const float* shift, const int64_t* seed, const int64_t* n0, void* y, float* mean, float* rstd, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride, double eps, double inv_keep, void* stream) {
  gn::Forward f{};
  f.drop = gn::drop(seed, n0, threshold, layer, inv_keep);
  f.affine = {gamma, beta, scale, shift, v, v_stride, stride};
  f.act = act != 0; f.eps = float(eps);
  f.x = x; f.y = y; f.mean = mean; f.rstd = rstd;
  const int size = gn::dtype_size(dtype);
  if (!gn::layout(f.p, gn::FORWARD, n, hw, c, 0, groups, size, 16 / size, aligned16({x, y}))) return (int)cudaErrorInvalidValue;
  BY_DTYPE(dtype, return f.p.resident ? gn::start(group_norm_silu_fwd_kernel<T, Vec<T>::N, true>, f, n, stream)
                       : f.p.lanes > 1 ? gn::start(group_norm_silu_fwd_kernel<T, Vec<T>::N, false>, f, n, stream)
                                       : gn::start(group_norm_silu_fwd_kernel<T, 1, false>, f, n, stream));
  return (int)cudaErrorInvalidValue;
}

extern "C" int group_norm_silu_bwd(const void* dy, const void* x, const float* gamma, const float* beta, const float* v,
    const float* scale, const float* shift, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* dx, float* dv,
    float* dscale, float* dshift, float* partials, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride, double inv_keep, void* stream) {
  gn::Backward f{};
  f.drop = gn::drop(seed, n0, threshold, layer, inv_keep);
  f.affine = {gamma, beta, scale, shift, v, v_stride, stride};
  f.act = act != 0; f.n = n;
  f.dy = dy; f.x = x; f.mean = mean; f.rstd = rstd;
  f.dx = dx; f.dv = dv; f.dscale = dscale; f.dshift = dshift; f.partials = partials;
  const int size = gn::dtype_size(dtype);
  if (!gn::layout(f.p, gn::BACKWARD, n, hw, c, 0, groups, size, 16 / size, aligned16({dy, x, dx}))) return (int)cudaErrorInvalidValue;
  auto run = [&](auto* kernel) { return gn::start(kernel, f, n, stream); };
  BY_DTYPE(dtype, return f.p.resident ? run(group_norm_silu_bwd_kernel<T, Vec<T>::N, true>)
                        : f.p.lanes > 1 ? run(group_norm_silu_bwd_kernel<T, Vec<T>::N, false>)
                                        : run(group_norm_silu_bwd_kernel<T, 1, false>));
  return (int)cudaErrorInvalidValue;
}
