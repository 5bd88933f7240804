// Sanitizer main of levels.cu: a full block of samples, one more, and one.
#include "../../csrc/launchers.h"
#include "san_gn.h"

int main() {
  const std::unique_ptr<int64_t> stage(new int64_t(2));
  int bad = 0;
  for (const int64_t n : {128, 129, 1}) {
    const Array normal(n, 4, 0, 1), t(n, 4, 0, 0), r(n, 4, 0, 0), label_t(n, 4, 0, 0), label_r(n, 4, 0, 0);
    bad += levels_fwd(normal, stage.get(), t, r, label_t, label_r, n, -1.1, 2.0, 2.0, 8.0, 1.0, nullptr);
    bad += unwritten("t", t, n, 0) + unwritten("r", r, n, 0) + unwritten("label_t", label_t, n, 0);
    bad += unwritten("label_r", label_r, n, 0);
  }
  printf("levels: %d failed\n", bad);
  return bad != 0;
}
