// plants PLANT: exact-size heap buffers, so that one element over is outside; exit 1 on a CUDA error, 2 on a wrong value.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" int centre(const void*, void*, void*, int64_t, int64_t, void*);

int main(int argc, char** argv) {
  constexpr int rows = 3, columns = 256;
  float* x = (float*)aligned_alloc(16, rows * columns * sizeof(float));
  float* y = (float*)aligned_alloc(16, rows * columns * sizeof(float));
  float* total = (float*)calloc(1, sizeof(float));
  for (int i = 0; i < rows * columns; i++) { x[i] = float(i % 7); y[i] = NAN; }
  if (const int code = centre(x, y, total, rows, argc > 1 ? atoi(argv[1]) : 0, nullptr)) return fprintf(stderr, "error %d\n", code), 1;
  double means = 0;
  for (int r = 0; r < rows; r++) {
    double mean = 0;
    for (int i = 0; i < columns; i++) mean += x[r * columns + i] / double(columns);
    means += mean;
    for (int i = 0; i < columns; i++) {
      const int k = r * columns + i;
      if (!(std::fabs(y[k] - (x[k] - mean)) < 1e-5)) return fprintf(stderr, "value: y[%d] is %g\n", k, y[k]), 2;
    }
  }
  if (!(std::fabs(*total - means) < 1e-5)) return fprintf(stderr, "value: total is %g, not %g\n", *total, means), 2;
  free(x); free(y); free(total);
  return 0;
}
