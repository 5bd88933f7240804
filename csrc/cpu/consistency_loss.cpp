// Loss of each sample and its gradient at F_t; formulas: kernels/ect_kernels/consistency_loss.py.
//
// A sample's differences are kept between the sum of their squares and the scaling to the gradient.
#include "cpu.hpp"

namespace {
struct Loss {
  const void *F_t, *F_r; const float *x_t, *x_r, *t, *r, *weight;
  float* loss; void* dF;
  int64_t m;               // values of a sample
  float c, sd, variance;   // sd: sigma_data, variance: its square
};

template <class T> void losses(const Loss& a, int64_t begin, int64_t end) {
  std::vector<float> room(a.m);
  float* RESTRICT d = room.data();
  for (int64_t n = begin; n < end; n++) {
    const float t = a.t[n], r = a.r[n], total_t = t * t + a.variance, total_r = r * r + a.variance;
    const float skip_t = a.variance / total_t, out_t = t * a.sd / std::sqrt(total_t);
    const float skip_r = a.variance / total_r, out_r = r * a.sd / std::sqrt(total_r);
    const T *F_t = static_cast<const T*>(a.F_t) + n * a.m, *F_r = static_cast<const T*>(a.F_r) + n * a.m;
    const float *x_t = a.x_t + n * a.m, *x_r = a.x_r + n * a.m;
    for (int64_t i = 0; i < a.m; i++) d[i] = skip_t * x_t[i] + out_t * to_float(F_t[i]);
    if (r > 0.f)
      for (int64_t i = 0; i < a.m; i++) d[i] -= skip_r * x_r[i] + out_r * to_float(F_r[i]);
    else
      for (int64_t i = 0; i < a.m; i++) d[i] -= x_r[i];

    const float s = sum(a.m, [&](int64_t i) { return d[i] * d[i]; });
    const float radicand = s + a.c * a.c, root = radicand == 0.f ? 1.f : std::sqrt(radicand), weight = a.weight[n];
    a.loss[n] = weight * (s / (root + a.c));
    const float slope = weight * out_t / root + (s - s);   // s - s: 0, or NaN where s overflowed
    T* RESTRICT dF = static_cast<T*>(a.dF) + n * a.m;
    for (int64_t i = 0; i < a.m; i++) dF[i] = from_float<T>(d[i] * slope);
  }
}
}  // namespace

int consistency_loss_fwd(const void* F_t, const void* F_r, const float* x_t, const float* x_r, const float* t, const float* r,
                         const float* weight, float* loss, void* dF, int64_t n, int64_t m, int64_t dtype, double c,
                         double sigma_data, void* threads) {
  if (n < 0 || m < 1 || m >= (1 << 28)) return 1;
  const Loss a = {F_t, F_r, x_t, x_r, t, r, weight, loss, dF, m, float(c), float(sigma_data), float(sigma_data * sigma_data)};
  BY_DTYPE(dtype, parallel(threads, n, m, [&](int64_t begin, int64_t end) { losses<T>(a, begin, end); }));
  return 0;
}
