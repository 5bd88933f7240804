// One optimizer step over flat fp32 arenas; formulas: kernels/ect_kernels/radam_ema.py. Two passes, over the gradients and over all.
#include "advance.h"
#include "cpu.hpp"

namespace {
constexpr int64_t CHUNK = 16384;   // as in radam_ema.py
constexpr float BOUND = 1e5f;

// The sum of squares and the number of non-finite gradients of a chunk, which are replaced.
void check(float* RESTRICT g, int64_t n, double* squares, double* bad) {
  *bad = sum(n, [&](int64_t i) { return g[i] - g[i] == 0.f ? 0.f : 1.f; });
  for (int64_t i = 0; *bad > 0 && i < n; i++)
    if (!(g[i] - g[i] == 0.f)) g[i] = g[i] > 0.f ? BOUND : g[i] < 0.f ? -BOUND : 0.f;
  *squares = sum(n, [&](int64_t i) { return g[i] * g[i]; });
}

// torch.lerp: exact at both ends.
inline float lerp(float a, float b, float w) { return w < 0.5f ? a + w * (b - a) : b - (b - a) * (1.f - w); }

void average(float* RESTRICT ema, const float* RESTRICT params, float weight, int64_t n) {
  for (int64_t i = 0; i < n; i++) ema[i] = lerp(ema[i], params[i], weight);
}

template <class T> void round(T* RESTRICT shadow, const float* RESTRICT params, int64_t n) {
  for (int64_t i = 0; i < n; i++) shadow[i] = from_float<T>(params[i]);
}

void update(float* RESTRICT p, float* RESTRICT g, float* RESTRICT m, float* RESTRICT v, const float* c, int64_t n) {
  const float shrink = c[SHRINK], unscale = c[UNSCALE], weight1 = c[WEIGHT1], beta2 = c[BETA2_F], weight2 = c[WEIGHT2];
  const float slope = c[SLOPE], floor = c[FLOOR], size = c[SIZE];
  if (shrink != 1.f)
    for (int64_t i = 0; i < n; i++) g[i] *= shrink;
  for (int64_t i = 0; i < n; i++) {
    const float used = g[i] * unscale;
    m[i] = lerp(m[i], used, weight1);
    v[i] = beta2 * v[i] + weight2 * used * used;
    const float denominator = slope == 0.f ? 1.f : std::sqrt(v[i]) * slope + floor;
    p[i] -= size * (m[i] / denominator);
  }
}
}  // namespace

int radam_ema_fwd(void* params, void* grads, void* exp_avg, void* exp_avg_sq, void* ema0, void* ema1, void* ema2, void* ema3,
                  void* shadow, int64_t half, void* state_f64, void* state_i64, void* partials, int64_t blocks,
                  void* coefficients, int64_t n, void* threads) {
  if (n < 0 || n % 8 || blocks != (n + CHUNK - 1) / CHUNK || (shadow && half != F16 && half != BF16)) return 1;
  const auto arena = [](void* memory) { return static_cast<float*>(memory); };
  double *squares = static_cast<double*>(partials), *bad = squares + blocks, total = 0, count = 0;
  const auto chunks = [&](const auto& run) {   // run(first value, values) for each
    parallel(threads, blocks, CHUNK, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) run(k * CHUNK, std::min(CHUNK, n - k * CHUNK));
    });
  };
  chunks([&](int64_t i, int64_t size) { check(arena(grads) + i, size, squares + i / CHUNK, bad + i / CHUNK); });
  for (int64_t k = 0; k < blocks; k++) { total += squares[k]; count += bad[k]; }
  float* c = arena(coefficients);
  advance(static_cast<double*>(state_f64), static_cast<int64_t*>(state_i64), c, total, int64_t(count));
  if (c[GO] == 0.f) return 0;
  float* emas[] = {arena(ema0), arena(ema1), arena(ema2), arena(ema3)};
  chunks([&](int64_t i, int64_t size) {
    float* p = arena(params) + i;
    update(p, arena(grads) + i, arena(exp_avg) + i, arena(exp_avg_sq) + i, c, size);
    for (int k = 0; k < MAX_EMAS; k++)
      if (emas[k]) average(emas[k] + i, p, c[EMA_WEIGHT0 + k], size);
    if (shadow && half == F16) round(static_cast<Half*>(shadow) + i, p, size);
    if (shadow && half == BF16) round(static_cast<Brain*>(shadow) + i, p, size);
  });
  return 0;
}
