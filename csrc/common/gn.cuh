// GroupNorm -> affine -> SiLU -> dropout over channels-last rows: what group_norm_silu.cu and residual_group_norm_silu.cu share,
// up to the kernels' bodies in gn_forward.cuh and gn_backward.cuh.
//
// One block owns one sample's slab: consecutive channels that make up whole groups. Its threads form rows x columns; a thread
// keeps V neighbouring channels (8, moved as 16-byte vectors, or 1 where sizes or addresses do not allow that) and every rows-th
// row, so sums per channel live in registers. Where the slab fits into shared memory ("resident") it is read from DRAM once;
// each thread then reads only what it has copied itself, so the copies need no barrier. Otherwise a second read follows.
#pragma once
#include "access.cuh"
#include "async.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace gn {

constexpr int THREADS = 256, MAX_GROUP = 4096, MAX_SLAB = 256, MAX_CHANNELS = 1 << 22;

// How a launch splits its work; the same for every block.
struct Layout {
  int hw, c1, c2, cg;             // rows of a sample, channels of the first and the second source, channels of a group
  int slab, slabs;                // channels of a block, blocks of a sample
  int columns, rows, threads;     // see above; rows * columns <= threads
  int vector, resident;           // V == 8; tile in shared memory
  int tile_bytes, red_floats;     // of one tile; of column_sums' workspace
  int bytes;                      // shared memory in all
};
struct Drop { const int64_t *seed, *n0; uint32_t threshold, layer; float inv_keep; };   // seed null: no dropout; n0 null: 0
// scale, shift, v: [n, c] or null, the samples' rows a stride apart (`rows` for scale and shift). The norm's affine map is z = (x_hat * gamma + beta) * (1 + scale) + shift.
struct Affine {
  const float *gamma, *beta, *scale, *shift, *v; int64_t v_rows, rows;
  __device__ float factor(int64_t n, int c) const { return scale ? 1.f + scale[n * rows + c] : 1.f; }
  __device__ float add(int64_t n, int c) const { return v ? v[n * v_rows + c] : 0.f; }
  __device__ float bias(int64_t n, int c) const { return beta[c] * factor(n, c) + (shift ? shift[n * rows + c] : 0.f); }
};

struct Forward {
  Layout p; Drop drop; Affine affine; int act; float eps;
  const void *x, *other;   // sources of the norm; residual: x is computed and written
  void* y; float *mean, *rstd;
  const void *a, *skip; const float *bias, *skip_bias; void* x_out; float skip_scale;   // residual only
};
struct Backward {
  Layout p; Drop drop; Affine affine; int act;
  const void *dy, *x, *other; const float *mean, *rstd;
  void *dx, *dother; float *partials, *dv, *dscale, *dshift; int64_t n;
  const void *dx_in, *djoined; float skip_scale;   // residual only: gradients that reached x, and cat(x, other), by another way
};

// Fills in `p`; false where the sizes are not supported. tiles: tensors held on chip; sums: results of the largest column_sums.
inline bool layout(Layout& p, int64_t n, int64_t hw, int64_t c1, int64_t c2, int64_t groups, int size, int tiles, int sums, bool aligned) {
  const int64_t c = c1 + c2;
  if (n < 0 || hw < 1 || c1 < 1 || c2 < 0 || groups < 1 || c % groups || c / groups > MAX_GROUP || c > MAX_CHANNELS || hw > INT32_MAX / c) return false;
  const int64_t cg = c / groups;
  int64_t unit = cg;   // of a slab: whole groups and, if possible, whole vectors
  while (unit % 8) unit += cg;
  const bool vector = aligned && c1 % 8 == 0 && c2 % 8 == 0 && unit <= 1024;
  if (!vector) unit = cg;
  const int lanes = vector ? 8 : 1;
  auto set = [&](int64_t slab) {   // true where the tile fits on chip
    const int64_t vectors = slab / lanes;
    p.threads = 64;
    while (p.threads < THREADS && (p.threads * 4 < vectors * hw || p.threads < vectors)) p.threads *= 2;
    p.columns = int(vectors < p.threads ? vectors : p.threads);
    p.rows = p.threads / p.columns;
    p.red_floats = (sums * lanes * (column_parts(p.columns, p.rows, p.threads) * p.columns + 1) + 3) / 4 * 4;
    const int64_t tile = hw * slab * size, rest = 4 * (p.red_floats + 8 * slab + 3 * (slab / cg));
    // Of few elements next to nothing is left of a gradient: the backward must not round its terms to the tile's dtype.
    p.resident = vector && p.columns == vectors && hw * cg >= 32 && tiles * tile + rest <= SHARED_BYTES;
    p.tile_bytes = p.resident ? int(tile) : 0;
    p.bytes = int(tiles * p.tile_bytes + rest);
    p.slab = int(slab);
    return bool(p.resident);
  };
  // Wide enough for full 64-byte segments and for some work per thread, if it stays on chip.
  int64_t slab = unit;
  bool fits = set(slab);
  while ((slab * size < 64 || slab * hw < 4096) && 2 * slab <= MAX_SLAB && 2 * slab <= c) {
    const bool wider = set(2 * slab);
    if (fits && !wider && slab * size >= 32) break;   // less than a 32-byte sector wastes more than a second read from L2
    slab *= 2;
    fits = wider;
  }
  set(slab);
  p.hw = int(hw); p.c1 = int(c1); p.c2 = int(c2); p.cg = int(cg); p.vector = vector;
  p.slabs = int((c + slab - 1) / slab);
  return n * p.slabs <= INT32_MAX;
}

// a - b = m + rest without rounding, for a and b of any sizes: a large mean leaves few digits behind its point.
__device__ __forceinline__ void subtract(float a, float b, float& m, float& rest) {
  m = a - b;
  const float minus_b = m - a;
  rest = (a - (m - minus_b)) + (-b - minus_b);
}

inline int dtype_size(int64_t dtype) { return dtype == F32 ? 4 : 2; }

template <class K, class A> int start(K* kernel, const A& args, int64_t n, void* stream) {
  if (n == 0) return (int)cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, args.p.bytes);
  if (error != cudaSuccess) return (int)error;
  LAUNCH(kernel, dim3(unsigned(n * args.p.slabs)), dim3(args.p.threads), args.p.bytes, (cudaStream_t)stream, args);
  return (int)cudaGetLastError();
}

template <int V, class T> __device__ __forceinline__ void copy_async(T* shared, const T* global) {
  if constexpr (V == 8) {
#pragma unroll
    for (int h = 0; h < V / Vec<T>::N; h++) copy16_async(shared + h * Vec<T>::N, global + h * Vec<T>::N);
  }
}

// This block's slab, and the thread's place in it.
struct Block {
  int64_t n;
  int c0, width;     // first channel, channels (the last slab may be narrower)
  int column, row;
  __device__ explicit Block(const Layout& p) {
    n = blockIdx.x / p.slabs;
    c0 = int(blockIdx.x % p.slabs) * p.slab;
    const int left = p.c1 + p.c2 - c0;
    width = left < p.slab ? left : p.slab;
    column = threadIdx.x % p.columns;
    row = threadIdx.x / p.columns;
  }
};
// Where a thread's V channels lie: k in the slab, c in all; its first element and the step to its next row, in their source
// (`second`: the other one) and in a tensor of all channels (y, dy).
template <int V> struct Channels {
  int k, c, step, step_whole;
  bool active, second;
  int64_t offset, whole;
  __device__ Channels(const Layout& p, const Block& b, int first) {
    k = first + b.column * V;
    c = b.c0 + k;
    active = b.row < p.rows && k < b.width;
    second = c >= p.c1;
    const int width = second ? p.c2 : p.c1;
    offset = (b.n * p.hw + b.row) * width + (second ? c - p.c1 : c);
    whole = (b.n * p.hw + b.row) * (p.c1 + p.c2) + c;
    step = p.rows * width;
    step_whole = p.rows * (p.c1 + p.c2);
  }
};

// Philox bits of the V elements of one row: one call per eight elements where V is 8.
template <int V> struct Mask {
  uint64_t seed = 0, index = 0, step = 0;   // of the thread's first row in the global batch; between its rows
  uint32_t threshold, layer;
  bool on;
  int first = 0;   // place of the thread's first channel in its block of eight
  uint4 bits;
  __device__ Mask(const Drop& d, const Layout& p, const Block& b, int c) : threshold(d.threshold), layer(d.layer), on(d.seed != nullptr) {
    if (!on) return;
    seed = (uint64_t)*d.seed;
    index = (uint64_t((d.n0 ? *d.n0 : 0) + b.n) * p.hw + b.row) * (p.c1 + p.c2) + c;
    step = uint64_t(p.rows) * (p.c1 + p.c2);
  }
  __device__ __forceinline__ void draw(int i) {   // for the thread's i-th row
    if constexpr (V == 8) {
      bits = philox(seed, uint32_t(index >> 3) + i * uint32_t(step >> 3), layer);
    } else {
      const uint64_t at = index + i * step;
      bits = philox(seed, uint32_t(at >> 3), layer);
      first = int(at & 7);
    }
  }
  __device__ __forceinline__ bool keep(int j) const { return keep8(bits, V == 8 ? j : first + j, threshold); }
};

}  // namespace gn
