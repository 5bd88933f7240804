// Sanitizer main of residual_group_norm_silu.cu: forward and backward of every shape, with all inputs and
// dropout, then with none; with a of x's dtype and of another.
#include "../../csrc/launchers.h"
#include "san_gn.h"

static int run(const Shape& s, bool all, int64_t of_a) {
  const int64_t m = s.n * s.hw * s.c, m2 = s.n * s.hw * s.c2, c = s.c + s.c2, ng = s.n * s.groups, size = s.dtype ? 2 : 4, wide = of_a ? 2 : 4, shift = s.shift / wide * wide;
  const Array a(m, wide, shift, 1), skip(m, wide, shift, 2), other(m2, size, s.shift, 3), dy(m + m2, size, s.shift, 4);
  const Array dx(m, size, s.shift, 5), x(m, size, s.shift, 0), y(m + m2, size, s.shift, 0), da(m, wide, shift, 0);
  const Array djoined(m + m2, size, s.shift, 10);
  const Array dother(m2, size, s.shift, 0), gamma(c, 4, 0, 6), beta(c, 4, 0, 7), bias(s.c, 4, 0, 8), skip_bias(s.c, 4, 0, 9);
  const Array mean(ng, 4, 0, 0), rstd(ng, 4, 0, 0);
  const Array partials(3 * s.n * c, 4, 0, 0);
  const std::unique_ptr<int64_t> seed(new int64_t(-12345)), first(new int64_t(1));
  const int64_t *key = all ? seed.get() : nullptr, *n0 = all ? first.get() : nullptr;
  const int64_t threshold = all ? 13107 : 0;
  const void* second = s.c2 ? other.as<void>() : nullptr;
  void* dsecond = s.c2 ? dother.as<void>() : nullptr;
  auto given = [&](const Array& t) { return all ? t.as<float>() : nullptr; };
  int bad = residual_group_norm_silu_fwd(a.as<void>(), given(bias), given(skip), given(skip_bias), second, gamma, beta, key, n0,
                                         x.as<void>(), y.as<void>(), mean, rstd, s.n, s.hw, s.c, s.c2, s.dtype, s.groups, of_a, all,
                                         threshold, 3, 0.7, 1e-6, 1.25, STREAM);
  bad |= residual_group_norm_silu_bwd(dy.as<void>(), given(dx), given(djoined), x.as<void>(), second, gamma, beta, key, n0, mean, rstd,
                                      da.as<void>(), dsecond, partials, s.n, s.hw, s.c, s.c2, s.dtype,
                                      s.groups, of_a, all, threshold, 3, 0.7, 1.25, STREAM);
  bad += unwritten("x", x, m, s.dtype) + unwritten("y", y, m + m2, s.dtype) + unwritten("da", da, m, of_a);
  bad += unwritten("dother", dother, m2, s.dtype) + unwritten("mean", mean, ng, 0) + unwritten("rstd", rstd, ng, 0);
  bad += unwritten("partials", partials, 3 * s.n * c, 0);
  return bad;
}

int main() {
  int bad = 0;
  for (const Shape& s : SHAPES) bad += run(s, true, s.dtype) != 0 || run(s, true, s.dtype ? 0 : 1) != 0;
  bad += run(SHAPES[0], false, SHAPES[0].dtype) + run(SHAPES[4], false, SHAPES[4].dtype);
  printf("residual_group_norm_silu: %d shapes failed\n", bad);
  return bad != 0;
}
