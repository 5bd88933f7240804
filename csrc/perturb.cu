// From uint8 images to the inputs of student and teacher (formulas: kernels/ect_kernels/perturb.py).
//
// A block owns some whole rows of one image. The noise counts in NCHW order, four values to a Philox call, but images and outputs
// are NHWC: so the threads first draw by call and put the values where they belong in shared memory, next to the rows' bytes,
// and then write by vector. Whole rows, so that a mirrored value finds its byte in the same block.
#include "access.cuh"
#include "philox.cuh"
#include "launchers.h"

namespace {
constexpr int THREADS = 256, VALUES = 1024, MAX_ROW = 8192;   // VALUES: of a block, about; MAX_ROW: as in perturb.py
constexpr uint32_t STREAM_EPS = 0xffffffffu;                  // philox.STREAM_EPS

struct Perturb {
  const uint8_t* images; const float *t, *r; const int64_t* seed; const uint8_t* flip; const float* eps; const int64_t* n0;
  void *in_t, *in_r; float *x_t, *x_r;
  int h, w, c, rows, slabs;   // of an image; rows of a block, blocks of an image
  float variance;             // sigma_data^2
};

// byte / 127.5, correctly rounded; a division would bring its slow path into the loop.
__device__ __forceinline__ float halves(float byte) {
  const float q = byte * (1 / 127.5f);
  return fmaf(fmaf(-q, 127.5f, byte), 1 / 127.5f, q);
}

template <class T, int V> __global__ void __launch_bounds__(THREADS) perturb_fwd_kernel(Perturb a) {
  SHARED_DYN(float, noise);   // of the rows, NHWC; then their bytes
  uint8_t* bytes = reinterpret_cast<uint8_t*>(noise + (a.eps ? 0 : a.rows * a.w * a.c));
  const int64_t n = blockIdx.x / a.slabs;
  const int row = int(blockIdx.x % a.slabs) * a.rows, hw = a.h * a.w;
  const int first = row * a.w, pixels = (a.h - row < a.rows ? a.h - row : a.rows) * a.w, count = pixels * a.c;
  const int64_t base = n * hw * a.c + int64_t(first) * a.c;

  if constexpr (V > 1) {
    for (int i = threadIdx.x; i < count / 16; i += THREADS)
      reinterpret_cast<uint4*>(bytes)[i] = __ldg(reinterpret_cast<const uint4*>(a.images + base) + i);
  } else {
    for (int i = threadIdx.x; i < count; i += THREADS) bytes[i] = a.images[base + i];
  }
  if (!a.eps) {
    const uint64_t seed = (uint64_t)*a.seed;
    const uint32_t counter = uint32_t(uint64_t((a.n0 ? *a.n0 : 0) + n) * uint64_t((int64_t(hw) * a.c + 3) / 4));
    const int most = (pixels + 6) / 4;   // calls that a channel's pixels can touch
    for (int i = threadIdx.x; i < a.c * most; i += THREADS) {
      const int channel = i / most, start = channel * hw + first, call = start / 4 + i % most;
      if (4 * call >= start + pixels) continue;
      float z[4];
      normal4(philox(seed, counter + call, STREAM_EPS), z);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int pixel = 4 * call + k - start;
        if (pixel >= 0 && pixel < pixels) noise[pixel * a.c + channel] = z[k];
      }
    }
  }
  __syncthreads();

  const float t = a.t[n], r = a.r[n], positive = r > 0.f ? r : 1.f;
  const float c_in_t = rsqrtf(t * t + a.variance), c_in_r = rsqrtf(positive * positive + a.variance);
  const bool mirrored = a.flip && a.flip[n];
  for (int i = threadIdx.x * V; i < count; i += THREADS * V) {
    float z[V], x_t[V], x_r[V], in_t[V], in_r[V];
    if (a.eps) load<true>(a.eps + base + i, z); else load<false>(noise + i, z);
    int channel = i % a.c, column = i / a.c % a.w;
#pragma unroll
    for (int k = 0; k < V; k++) {
      const float y = halves(bytes[i + k + (mirrored ? (a.w - 1 - 2 * column) * a.c : 0)]) - 1.f;
      x_t[k] = y + t * z[k]; in_t[k] = x_t[k] * c_in_t;
      x_r[k] = y + r * z[k]; in_r[k] = x_r[k] * c_in_r;
      if (++channel == a.c) { channel = 0; column = column + 1 == a.w ? 0 : column + 1; }
    }
    store(a.x_t + base + i, x_t);
    store(a.x_r + base + i, x_r);
    store(static_cast<T*>(a.in_t) + base + i, in_t);
    store(static_cast<T*>(a.in_r) + base + i, in_r);
  }
}

template <class T> int start(Perturb a, int64_t n, void* stream_) {
  [[maybe_unused]] const auto stream = static_cast<cudaStream_t>(stream_);   // the emulator takes none
  const int row = a.w * a.c;
  int whole = 1;   // rows that make up whole 16-byte vectors of bytes
  while (whole * row % 16) whole *= 2;
  const bool vector = a.h % whole == 0 && aligned16({a.images, a.eps, a.in_t, a.in_r, a.x_t, a.x_r}) && whole * row <= MAX_ROW;
  const int unit = vector ? whole : 1, units = a.h / unit;
  const int most = unit * row > VALUES ? 1 : VALUES / (unit * row);   // units of a block
  a.slabs = (units + most - 1) / most;
  a.rows = (units + a.slabs - 1) / a.slabs * unit;   // of about equal size
  a.slabs = (a.h + a.rows - 1) / a.rows;
  if (n * a.slabs > INT32_MAX) return (int)cudaErrorInvalidValue;
  const size_t bytes = size_t(a.rows) * row * (a.eps ? 1 : 5);
  const dim3 grid(unsigned(n * a.slabs));
  if (vector) LAUNCH((perturb_fwd_kernel<T, 8>), grid, dim3(THREADS), bytes, stream, a);
  else LAUNCH((perturb_fwd_kernel<T, 1>), grid, dim3(THREADS), bytes, stream, a);
  return (int)cudaGetLastError();
}
}  // namespace

// images: uint8 [n, h, w, c]; t, r: [n]; flip: [n] of 0 and 1, or null; eps: [n, h, w, c] or null, then drawn with *seed; in_t,
// in_r (of `dtype`), x_t, x_r: [n, h, w, c]. *n0: global number of the first image, null for 0.
extern "C" int perturb_fwd(const uint8_t* images, const float* t, const float* r, const int64_t* seed, const uint8_t* flip,
                           const float* eps, const int64_t* n0, void* in_t, void* in_r, float* x_t, float* x_r, int64_t n, int64_t h,
                           int64_t w, int64_t c, int64_t dtype, double sigma_data, void* stream) {
  if (n < 0 || h < 1 || w < 1 || c < 1 || h > INT32_MAX || w > MAX_ROW || c > MAX_ROW || w * c > MAX_ROW ||
      h * w * c >= (1 << 28) || (!eps && !seed))
    return (int)cudaErrorInvalidValue;
  if (n == 0) return (int)cudaSuccess;
  const Perturb a = {images, t, r, seed, flip, eps, n0, in_t, in_r, x_t, x_r, int(h), int(w), int(c), 0, 0, float(sigma_data * sigma_data)};
  BY_DTYPE(dtype, return start<T>(a, n, stream));
  return (int)cudaErrorInvalidValue;
}
