// Noise levels of training pairs, the U-Net's labels of them, and flips; formulas: kernels/ect_kernels/levels.py.
#include "cpu.hpp"

static constexpr uint32_t STREAM_T = 0xfffffffeu, STREAM_FLIP = 0xfffffffdu;   // philox.STREAM_T, philox.STREAM_FLIP

int levels_fwd(const int64_t* seed, const int64_t* stage, const int64_t* n0, float* t, float* r, float* label_t, float* label_r,
               uint8_t* flip, int64_t n, double mean, double std, double q, double k, double b, void*) {
  if (n < 1 || n > INT32_MAX || !(q > 1)) return 1;
  const float decay = float(std::pow(q, -double(*stage + 1)));
  const uint32_t first = uint32_t(n0 ? *n0 : 0);
  for (int64_t i = 0; i < n; i++) {   // a few numbers: not worth a thread or a vector
    uint32_t words[4], other[4];
    float z[2];
    philox(uint64_t(*seed), first + uint32_t(i), STREAM_T, 1, words);
    philox(uint64_t(*seed), first + uint32_t(i), STREAM_FLIP, 1, other);
    normal(words, 1, z);
    t[i] = std::exp(float(mean) + float(std) * z[0]);
    r[i] = std::fmax(t[i] * (1.f - decay * (1.f + float(k) / (1.f + std::exp(float(b) * t[i])))), 0.f);
    label_t[i] = std::log(t[i]) / 4;
    label_r[i] = std::log(r[i] > 0.f ? r[i] : 1.f) / 4;
    flip[i] = other[0] >> 31 == 0;   // uniform < 1/2
  }
  return 0;
}
