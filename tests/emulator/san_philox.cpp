// Sanitizer main of philox.cu: uniform and normal draws, whole calls and parts of one.
#include "../../csrc/launchers.h"
#include "san_gn.h"

int main() {
  const int64_t sizes[][2] = {{128, 1}, {3, 4}, {5, 7}, {2, 1030}, {1, 2}};
  const std::unique_ptr<int64_t> seed(new int64_t(-12345));
  int bad = 0;
  for (const auto& [n, per_sample] : sizes)
    for (int64_t gaussian = 0; gaussian < 2; gaussian++) {
      const Array out(n * per_sample, 4, 0, 0);
      bad += philox_fwd(seed.get(), out, n, per_sample, 3, 7, gaussian, nullptr) + unwritten("out", out, n * per_sample, 0);
    }
  printf("philox: %d failed\n", bad);
  return bad != 0;
}
