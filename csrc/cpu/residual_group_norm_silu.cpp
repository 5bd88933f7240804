// The seam between two blocks and its backward; formulas: kernels/ect_kernels/residual_group_norm_silu.py.
#include "gn.hpp"

int residual_group_norm_silu_fwd(const void* a, const float* bias, const void* skip, const float* skip_bias, const void* other,
                                 const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, void* x, void* y,
                                 float* mean, float* rstd, int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype, int64_t groups,
                                 int64_t dtype_of_a, int64_t act, int64_t threshold, int64_t layer, double skip_scale, double eps,
                                 double inv_keep, void* threads) {
  gn::Forward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.eps = eps;
  f.sources[0] = {x, dtype, c}; f.sources[1] = {other, dtype, c2}; f.y = {y, dtype, c + c2}; f.mean = mean; f.rstd = rstd;
  f.a = {a, dtype_of_a, c}; f.skip = {skip, dtype_of_a, c}; f.bias = bias; f.skip_bias = skip_bias; f.skip_scale = float(skip_scale);
  if (!f.s.set(n, hw, c, c2, groups)) return 1;
  gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::forward(f, i, room); });
  return 0;
}

int residual_group_norm_silu_bwd(const void* dy, const void* dx, const void* djoined, const void* x, const void* other,
                                 const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, const float* mean,
                                 const float* rstd, void* da, void* dother, float* partials, int64_t n, int64_t hw, int64_t c, int64_t c2,
                                 int64_t dtype, int64_t groups, int64_t dtype_of_a, int64_t act, int64_t threshold, int64_t layer,
                                 double skip_scale, double inv_keep, void* threads) {
  gn::Backward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.skip_scale = float(skip_scale); f.residual = true;
  f.dy = {dy, dtype, c + c2}; f.sources[0] = {x, dtype, c}; f.sources[1] = {other, dtype, c2}; f.mean = mean; f.rstd = rstd;
  f.grads[0] = {da, dtype_of_a, c}; f.grads[1] = {dother, dtype, c2}; f.rows = partials;
  f.dx = {dx, dtype, c}; f.djoined = {djoined, dtype, c + c2};
  if (!f.s.set(n, hw, c, c2, groups)) return 1;
  gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::backward(f, i, room); });
  return 0;
}
