// The scalars of an optimizer step (formulas: kernels/ect_kernels/radam_ema.py), for the CUDA form and for the CPU's.
#pragma once
#include <math.h>
#include <stdint.h>
#if !defined(__CUDACC__) && !defined(__device__)
#define __device__
#endif

constexpr int MAX_EMAS = 4;   // as in radam_ema.py
constexpr double SCALE_MIN = 0x1p-32, SCALE_MAX = 0x1p32;
enum F64 { LR, BETA1, BETA2, EPS, CLIP, LOSS_SCALE, EMA_BETA0, GRAD_NORM = EMA_BETA0 + MAX_EMAS };
enum I64 { STEPS, NONFINITE, GOOD_STEPS, SKIPPED, GROWTH_INTERVAL, OPTIMIZER };
enum Coefficient { GO, SHRINK, UNSCALE, BETA1_F, BETA2_F, WEIGHT1, WEIGHT2, SLOPE, FLOOR, SIZE, EMA_WEIGHT0 };

// Moves the state on by one step, from the sum of squares and the number of non-finite gradients, and leaves in c what the update reads.
__device__ inline void advance(double* f, int64_t* s, float* c, double squares, int64_t bad) {
  const double scale = f[LOSS_SCALE], unscale = scale > 0 ? 1 / scale : 1, norm = sqrt(squares) * unscale;
  const bool skip = scale > 0 && bad > 0, adam = s[OPTIMIZER] == 1;
  const double ratio = f[CLIP] / (norm + 1e-6), t = double(s[STEPS] + 1);
  const double power2 = pow(f[BETA2], t), correction2 = 1 - power2, root = sqrt(correction2);
  const double rho_inf = 2 / (1 - f[BETA2]) - 1, rho = rho_inf - 2 * t * power2 / correction2;
  const bool adaptive = adam || rho > 5;
  double size = f[LR] / (1 - pow(f[BETA1], t));
  if (adaptive && !adam) size *= sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) * root;
  c[GO] = skip ? 0.f : 1.f;
  c[SHRINK] = ratio < 1 ? float(ratio) : 1.f;
  c[UNSCALE] = float(unscale);
  c[BETA1_F] = float(f[BETA1]); c[WEIGHT1] = float(1 - f[BETA1]);
  c[BETA2_F] = float(f[BETA2]); c[WEIGHT2] = float(1 - f[BETA2]);
  c[SLOPE] = !adaptive ? 0.f : adam ? float(1 / root) : 1.f;   // 0: a plain momentum step
  c[FLOOR] = float(f[EPS]);
  c[SIZE] = float(size);
  for (int k = 0; k < MAX_EMAS; k++) c[EMA_WEIGHT0 + k] = float(1 - f[EMA_BETA0 + k]);

  f[GRAD_NORM] = skip ? INFINITY : norm;
  s[NONFINITE] += bad;
  s[skip ? SKIPPED : STEPS] += 1;
  if (!(scale > 0)) return;
  s[GOOD_STEPS] = skip ? 0 : s[GOOD_STEPS] + 1;
  const bool grow = !skip && s[GOOD_STEPS] >= s[GROWTH_INTERVAL];
  if (grow) s[GOOD_STEPS] = 0;
  f[LOSS_SCALE] = fmin(fmax(skip ? scale / 2 : grow ? scale * 2 : scale, SCALE_MIN), SCALE_MAX);
}
