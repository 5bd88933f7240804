// radam_ema under the sanitizers: exact-size heap buffers, several sizes, every arena and option; exit 1 on a CUDA error, 2 on
// a wrong value.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include "san_gn.h"

extern "C" int radam_ema_fwd(void*, void*, void*, void*, void*, void*, void*, void*, void*, int64_t, void*, void*, void*, int64_t,
                             void*, int64_t, void*);

static float* arena(int64_t n, float value) {
  float* x = (float*)aligned_alloc(16, n * sizeof(float));
  for (int64_t i = 0; i < n; i++) x[i] = value * float(i % 13 - 6);
  return x;
}

static int step(int64_t n, int emas, int64_t half, double loss_scale, bool bad) {
  float *p = arena(n, 0.1f), *g = arena(n, 1.f), *m = arena(n, 0.f), *v = arena(n, 0.f), *ema[4] = {};
  for (int k = 0; k < emas; k++) ema[k] = arena(n, 0.1f);
  void* shadow = half ? aligned_alloc(16, n * 2) : nullptr;
  if (shadow) memset(shadow, 0xFF, n * 2);
  double f[11] = {1e-2, 0.9, 0.99, 1e-8, 1.0, loss_scale, 0.9, 0.5, 0.0, 0.1, 0};
  int64_t s[6] = {7, 0, 0, 0, 1, 0};
  const int64_t blocks = (n + 16383) / 16384;
  double* partials = (double*)malloc(2 * blocks * sizeof(double));
  float* c = (float*)malloc(16 * sizeof(float));
  if (bad) g[n - 1] = NAN, g[0] = -INFINITY;
  const float before = p[n - 1];
  const int code = radam_ema_fwd(p, g, m, v, ema[0], ema[1], ema[2], ema[3], shadow, half, f, s, partials, blocks, c, n, STREAM);
  const bool skip = bad && loss_scale > 0, moved = p[n - 1] != before;
  bool ok = s[0] == (skip ? 7 : 8) && s[1] == (bad ? 2 : 0) && s[3] == skip && (bad || moved) && !(skip && moved);
  for (int64_t i = 0; i < n; i++) ok = ok && std::isfinite(p[i]) && std::isfinite(g[i]);
  for (int64_t i = 0; shadow && !skip && i < n; i++) ok = ok && ((uint16_t*)shadow)[i] != 0xFFFF;
  free(p); free(g); free(m); free(v); free(shadow); free(partials); free(c);
  for (float* e : ema) free(e);
  if (code) return fprintf(stderr, "n %ld: error %d\n", (long)n, code), 1;
  if (!ok) return fprintf(stderr, "value: n %ld emas %d scale %g bad %d\n", (long)n, emas, loss_scale, bad), 2;
  return 0;
}

int main() {
  int code = 0;
  for (int64_t n : {8, 136, 264, 4104, 16392})
    for (int bad = 0; bad < 2; bad++) {
      code |= step(n, 4, 1, 0.0, bad) | step(n, 1, 2, 1024.0, bad);
      if (n < 300) code |= step(n, 0, 0, 0.0, bad);
    }
  return code;
}
