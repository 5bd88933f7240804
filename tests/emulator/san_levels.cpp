// Sanitizer main of levels.cu: a full block of samples, one more, and one.
#include "../../csrc/launchers.h"
#include "san_gn.h"

int main() {
  const std::unique_ptr<int64_t> seed(new int64_t(-12345)), stage(new int64_t(2)), n0(new int64_t(3));
  int bad = 0;
  for (const int64_t n : {128, 129, 1}) {
    const Array t(n, 4, 0, 0), r(n, 4, 0, 0), label_t(n, 4, 0, 0), label_r(n, 4, 0, 0);
    const std::unique_ptr<uint8_t[]> flip(new uint8_t[n]);
    std::fill_n(flip.get(), n, uint8_t(7));
    bad += levels_fwd(seed.get(), stage.get(), n0.get(), t, r, label_t, label_r, flip.get(), n, -1.1, 2.0, 2.0, 8.0, 1.0, STREAM);
    bad += unwritten("t", t, n, 0) + unwritten("r", r, n, 0) + unwritten("label_t", label_t, n, 0);
    bad += unwritten("label_r", label_r, n, 0);
    for (int64_t i = 0; i < n; i++) bad += flip[i] > 1;
  }
  printf("levels: %d failed\n", bad);
  return bad != 0;
}
