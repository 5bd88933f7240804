// dropout(silu(GroupNorm(x + v) * (1 + scale) + shift)) and its backward; formulas: kernels/ect_kernels/group_norm_silu.py.
#include "gn.hpp"

int group_norm_silu_fwd(const void* x, const float* gamma, const float* beta, const float* v, const float* scale, const float* shift,
                        const int64_t* seed, const int64_t* n0, void* y, float* mean, float* rstd, int64_t n, int64_t hw, int64_t c,
                        int64_t groups, int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride,
                        double eps, double inv_keep, void* threads) {
  gn::Forward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, scale, shift, v, v_stride, stride};
  f.act = act != 0; f.eps = eps;
  f.sources[0] = {x, dtype, c}; f.y = {y, dtype, c}; f.mean = mean; f.rstd = rstd;
  if (!f.s.set(n, hw, c, 0, groups)) return 1;
  gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::forward(f, i, room); });
  return 0;
}

int group_norm_silu_bwd(const void* dy, const void* x, const float* gamma, const float* beta, const float* v, const float* scale,
                        const float* shift, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* dx,
                        float* dv, float* dscale, float* dshift, float* partials, int64_t n, int64_t hw, int64_t c, int64_t groups,
                        int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride,
                        double inv_keep, void* threads) {
  gn::Backward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, scale, shift, v, v_stride, stride};
  f.act = act != 0; f.skip_scale = 1.f;
  f.dy = {dy, dtype, c}; f.sources[0] = {x, dtype, c}; f.mean = mean; f.rstd = rstd;
  f.grads[0] = {dx, dtype, c}; f.dv = dv; f.dscale = dscale; f.dshift = dshift; f.rows = partials;
  if (!f.s.set(n, hw, c, 0, groups)) return 1;
  gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::backward(f, i, room); });
  return 0;
}
