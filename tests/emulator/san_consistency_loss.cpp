// Sanitizer main of consistency_loss.cu: samples on chip and read twice, whole vectors and odd sizes, rows without a teacher.
#include "../../csrc/launchers.h"
#include "san_gn.h"

struct Sample { int64_t n, m, dtype, shift; };
// 3x32x32; 1x8x8; above the shared memory; no vectors by size; by address; one value.
static const Sample SAMPLES[] = {{2, 3072, 1, 0}, {3, 64, 2, 0}, {1, 20488, 1, 0}, {1, 20491, 0, 0}, {2, 75, 2, 0}, {1, 96, 0, 4}, {2, 1, 1, 0}};

static int run(const Sample& s, double c) {
  const int64_t m = s.n * s.m, size = s.dtype ? 2 : 4;
  const Array F_t(m, size, s.shift, 1), F_r(m, size, 0, 2), x_t(m, 4, s.shift, 3), x_r(m, 4, 0, 4), dF(m, size, s.shift, 0);
  const Array t(s.n, 4, 0, 5), r(s.n, 4, 0, 6), weight(s.n, 4, 0, 7), loss(s.n, 4, 0, 0);
  r.as<float>()[0] = 0.f;   // no teacher: what it says is not read
  memset(F_r.as<char>(), 0xFF, s.m * size);
  const int bad = consistency_loss_fwd(F_t.as<void>(), F_r.as<void>(), x_t, x_r, t, r, weight, loss, dF.as<void>(), s.n, s.m,
                                       s.dtype, c, 0.5, STREAM);
  return bad + unwritten("loss", loss, s.n, 0) + unwritten("dF", dF, m, s.dtype);
}

int main() {
  int bad = 0;
  for (const Sample& s : SAMPLES) bad += run(s, 0.0) != 0 || run(s, 0.06) != 0;
  printf("consistency_loss: %d sizes failed\n", bad);
  return bad != 0;
}
