// From uint8 images to the inputs of student and teacher; formulas: kernels/ect_kernels/perturb.py.
//
// A sample is drawn, in the order of its channels, then laid out by pixels, mirrored, and written value by value.
#include "cpu.hpp"

namespace {
constexpr uint32_t STREAM_EPS = 0xffffffffu;   // philox.STREAM_EPS

struct Perturb {
  const uint8_t* images; const float *t, *r; const int64_t* seed; const uint8_t* flip; const float* eps; const int64_t* n0;
  void *in_t, *in_r; float *x_t, *x_r;
  int64_t h, w, c;
  float variance;   // sigma_data^2
};

// The noise of sample n, [h w, c]; words, drawn: room for whole blocks of draws.
void draw(const Perturb& a, int64_t n, uint32_t* words, float* drawn, float* RESTRICT noise) {
  const int64_t pixels = a.h * a.w, blocks = (pixels * a.c + 3) / 4;
  philox(uint64_t(*a.seed), uint32_t(uint64_t((a.n0 ? *a.n0 : 0) + n) * uint64_t(blocks)), STREAM_EPS, blocks, words);
  normal(words, 2 * blocks, drawn);
  for (int64_t channel = 0; channel < a.c; channel++)
    for (int64_t pixel = 0; pixel < pixels; pixel++) noise[pixel * a.c + channel] = drawn[channel * pixels + pixel];
}

// The sample's bytes, [h w, c], mirrored where it is flipped.
void lay(const Perturb& a, int64_t n, uint8_t* RESTRICT bytes) {
  const uint8_t* image = a.images + n * a.h * a.w * a.c;
  if (!a.flip || !a.flip[n]) { std::memcpy(bytes, image, size_t(a.h * a.w * a.c)); return; }
  for (int64_t row = 0; row < a.h; row++)
    for (int64_t column = 0; column < a.w; column++)
      for (int64_t channel = 0; channel < a.c; channel++)
        bytes[(row * a.w + column) * a.c + channel] = image[(row * a.w + a.w - 1 - column) * a.c + channel];
}

template <class T> void perturb(const Perturb& a, int64_t begin, int64_t end) {
  const int64_t size = a.h * a.w * a.c, room = (size + 3) / 4 * 4;
  std::vector<uint8_t> bytes(size);
  std::vector<uint32_t> words(a.eps ? 0 : room);
  std::vector<float> drawn(a.eps ? 0 : room), noise(a.eps ? 0 : size);
  for (int64_t n = begin; n < end; n++) {
    if (!a.eps) draw(a, n, words.data(), drawn.data(), noise.data());
    lay(a, n, bytes.data());
    const float* RESTRICT z = a.eps ? a.eps + n * size : noise.data();
    const uint8_t* RESTRICT byte = bytes.data();
    float *RESTRICT x_t = a.x_t + n * size, *RESTRICT x_r = a.x_r + n * size;
    T *RESTRICT in_t = static_cast<T*>(a.in_t) + n * size, *RESTRICT in_r = static_cast<T*>(a.in_r) + n * size;
    const float t = a.t[n], r = a.r[n], positive = r > 0.f ? r : 1.f;
    const float c_in_t = 1.f / std::sqrt(t * t + a.variance), c_in_r = 1.f / std::sqrt(positive * positive + a.variance);
    for (int64_t i = 0; i < size; i++) {
      const float y = float(byte[i]) / 127.5f - 1.f, noisy_t = y + t * z[i], noisy_r = y + r * z[i];
      x_t[i] = noisy_t; in_t[i] = from_float<T>(noisy_t * c_in_t);
      x_r[i] = noisy_r; in_r[i] = from_float<T>(noisy_r * c_in_r);
    }
  }
}
}  // namespace

int perturb_fwd(const uint8_t* images, const float* t, const float* r, const int64_t* seed, const uint8_t* flip, const float* eps,
                const int64_t* n0, void* in_t, void* in_r, float* x_t, float* x_r, int64_t n, int64_t h, int64_t w, int64_t c,
                int64_t dtype, double sigma_data, void* threads) {
  if (n < 0 || h < 1 || w < 1 || c < 1 || h * w * c >= (1 << 28) || (!eps && !seed)) return 1;
  const Perturb a = {images, t, r, seed, flip, eps, n0, in_t, in_r, x_t, x_r, h, w, c, float(sigma_data * sigma_data)};
  BY_DTYPE(dtype, parallel(threads, n, h * w * c, [&](int64_t begin, int64_t end) { perturb<T>(a, begin, end); }));
  return 0;
}
