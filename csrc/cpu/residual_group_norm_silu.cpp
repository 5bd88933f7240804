// The seam between two blocks and its backward; formulas: kernels/ect_kernels/residual_group_norm_silu.py.
#include "gn.hpp"

// Runs the statement with A, the type of a, and T, that of x: the same, or one of the two float.
#define BY_DTYPES(of_a, of_x, ...) \
  if (of_a == of_x) { BY_DTYPE(of_x, using A = T; __VA_ARGS__) } \
  else if (of_a == F32) { using A = float; BY_DTYPE(of_x, __VA_ARGS__) } \
  else if (of_x == F32) { BY_DTYPE(of_a, using A = T; { using T = float; __VA_ARGS__; }) } \
  else return 1;

int residual_group_norm_silu_fwd(const void* a, const float* bias, const void* skip, const float* skip_bias, const void* other,
                                 const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, void* x, void* y,
                                 float* mean, float* rstd, int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype, int64_t groups,
                                 int64_t dtype_of_a, int64_t act, int64_t threshold, int64_t layer, double skip_scale, double eps,
                                 double inv_keep, void* threads) {
  gn::Forward f{};
  f.drop = {threshold ? seed : nullptr, n0, uint32_t(threshold), uint32_t(layer), float(inv_keep)};
  f.affine = {gamma, beta, nullptr, nullptr, nullptr, 0, 0};
  f.act = act != 0; f.eps = eps;
  f.x = x; f.other = other; f.y = y; f.mean = mean; f.rstd = rstd;
  f.a = a; f.skip = skip; f.bias = bias; f.skip_bias = skip_bias; f.sum = x; f.skip_scale = float(skip_scale);
  if (!gn::shape(f.s, n, hw, c, c2, groups)) return 1;
  BY_DTYPES(dtype_of_a, dtype, gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::forward<T, A>(f, i, room); }));
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
  f.dy = dy; f.x = x; f.other = other; f.mean = mean; f.rstd = rstd;
  f.dx = da; f.dother = dother; f.rows = partials; f.dx_in = dx; f.djoined = djoined;
  if (!gn::shape(f.s, n, hw, c, c2, groups)) return 1;
  BY_DTYPES(dtype_of_a, dtype, gn::samples(f, threads, [&](int64_t i, gn::Room& room) { gn::backward<T, A>(f, i, room); }));
  return 0;
}
