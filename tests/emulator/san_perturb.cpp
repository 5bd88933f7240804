// Sanitizer main of perturb.cu: drawn and given noise, mirrored or not, every dtype, whole vectors and odd sizes.
#include "../../csrc/launchers.h"
#include "san_gn.h"

struct Image { int64_t n, h, w, c, dtype, shift; };
// 3x32x32 and 1x8x8; several blocks of unequal size; no vectors by size; by address; one value; channels that do not divide four.
static const Image IMAGES[] = {{2, 32, 32, 3, 1, 0}, {3, 8, 8, 1, 2, 0}, {1, 40, 10, 5, 0, 0}, {2, 13, 29, 3, 2, 0},
                               {1, 16, 16, 3, 1, 4}, {2, 1, 1, 1, 0, 0}, {1, 3, 5, 7, 1, 0}};

static int run(const Image& s, bool drawn, bool mirror) {
  const int64_t m = s.n * s.h * s.w * s.c, size = s.dtype ? 2 : 4;
  const Array images(m, 1, s.shift, 0), t(s.n, 4, 0, 1), r(s.n, 4, 0, 2), eps(m, 4, 0, 3), flip(s.n, 1, 0, 0);
  const Array in_t(m, size, s.shift, 0), in_r(m, size, s.shift, 0), x_t(m, 4, s.shift, 0), x_r(m, 4, 0, 0);
  for (int64_t n = 0; n < s.n; n++) flip.as<uint8_t>()[n] = n % 2 == 0;
  const std::unique_ptr<int64_t> seed(new int64_t(-12345)), n0(new int64_t(5));
  int bad = perturb_fwd(images.as<uint8_t>(), t, r, drawn ? seed.get() : nullptr, mirror ? flip.as<uint8_t>() : nullptr,
                        drawn ? nullptr : eps.as<float>(), drawn ? n0.get() : nullptr, in_t.as<void>(), in_r.as<void>(), x_t, x_r, s.n, s.h, s.w, s.c,
                        s.dtype, 0.5, STREAM);
  bad += unwritten("in_t", in_t, m, s.dtype) + unwritten("in_r", in_r, m, s.dtype);
  return bad + unwritten("x_t", x_t, m, 0) + unwritten("x_r", x_r, m, 0);
}

int main() {
  int bad = 0;
  for (const Image& s : IMAGES) bad += run(s, true, true) != 0 || run(s, false, false) != 0 || run(s, false, true) != 0;
  printf("perturb: %d sizes failed\n", bad);
  return bad != 0;
}
