// GroupNorm -> affine -> SiLU -> dropout over channels-last rows: what group_norm_silu.cu and residual_group_norm_silu.cu share,
// up to the kernels' bodies in gn_forward.cuh and gn_backward.cuh.
//
// One block owns one sample's slab: consecutive channels that make up whole groups. Its threads form rows x columns; a thread
// keeps V neighbouring channels and every rows-th row, so sums per channel live in registers. V is 8 (4 of floats), so that
// neighbouring threads move neighbouring 16 bytes, or 1 where sizes or addresses do not allow that. Where the slab fits into
// shared memory ("resident") it is read from DRAM once; each thread then reads only what it has copied itself, so the copies need
// no barrier: it works on the first of them while the last are on their way. Otherwise a second read follows.
#pragma once
#include "access.cuh"
#include "async.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "shared.cuh"

namespace gn {

constexpr int THREADS = 256, MAX_GROUP = 4096, MAX_SLAB = 256, MAX_CHANNELS = 1 << 22;
constexpr int GROUPS = 4;   // of copies, at most what copy_wait_but() tells apart

// Rows that a thread handles between two draws of random bits, which serve eight elements.
template <int V> constexpr int ROWS = V == 4 ? 2 : 1;

// How a launch splits its work; the same for every block.
struct Layout {
  int hw, c1, c2, cg;             // rows of a sample, channels of the first and the second source, channels of a group
  int slab, slabs;                // channels of a block, blocks of a sample
  Teams teams;                    // of V channels by a row
  int span;                       // rows of a group of copies, of all threads together
  int lanes, resident;            // V; tile in shared memory
  int tile_bytes, red_floats;     // of one tile; of column_sums' workspace
  int bytes;                      // shared memory in all
  __device__ int end(int group) const { return group + 1 < GROUPS && (group + 1) * span < hw ? (group + 1) * span : hw; }
};
// seed null: no dropout; n0 null: 0. limit: the threshold, as keep8 takes it; keep: probability of keeping an element.
struct Drop { const int64_t *seed, *n0; uint32_t limit, layer; float keep, inv_keep; };
inline Drop drop(const int64_t* seed, const int64_t* n0, int64_t threshold, int64_t layer, double inv_keep) {
  if (!seed || !threshold) return {nullptr, n0, 0, 0, 1.f, 1.f};
  return {seed, n0, uint32_t(threshold) << 16, uint32_t(layer), float(1 / inv_keep), float(inv_keep)};
}
// scale, shift, v: [n, c] or null; the rows of two samples are `stride` apart in scale and shift, and v_stride in v. The norm's
// affine map is z = (x_hat * gamma + beta) * (1 + scale) + shift.
struct Affine {
  const float *gamma, *beta, *scale, *shift, *v; int64_t v_stride, stride;
  __device__ float factor(int64_t n, int c) const { return scale ? 1.f + scale[n * stride + c] : 1.f; }
  __device__ float gain(int64_t n, int c) const { return gamma[c] * factor(n, c); }
  __device__ float add(int64_t n, int c) const { return v ? v[n * v_stride + c] : 0.f; }
  __device__ float bias(int64_t n, int c) const { return beta[c] * factor(n, c) + (shift ? shift[n * stride + c] : 0.f); }
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
  __device__ int64_t group(int64_t sample, int c) const { return sample * ((p.c1 + p.c2) / p.cg) + c / p.cg; }
};

// What a kernel keeps on chip. tiles: tensors; sums: results of its largest column_sums; vectors, scalars: arrays by channel where a
// thread has several channels, and where it has one. The widest group takes 66 KB so, which every device has.
struct Needs { int tiles, sums, vectors, scalars; };
constexpr Needs FORWARD = {1, 2, 6, 4}, BACKWARD = {2, 3, 8, 3};

// Fills in `p`; false where the sizes are not supported. size: bytes of an element of the norm's sources; lanes: V where sizes and
// `aligned` allow vectors.
inline bool layout(Layout& p, const Needs& needs, int64_t n, int64_t hw, int64_t c1, int64_t c2, int64_t groups, int size, int lanes, bool aligned) {
  const int64_t c = c1 + c2;
  if (n < 0 || hw < 1 || c1 < 1 || c2 < 0 || groups < 1 || c % groups || c / groups > MAX_GROUP || c > MAX_CHANNELS || hw > (INT32_MAX - THREADS) / c) return false;
  const int64_t cg = c / groups;
  int64_t unit = cg;   // of a slab: whole groups and, if possible, whole vectors
  while (unit % 8) unit += cg;
  const bool vector = aligned && c1 % 8 == 0 && c2 % 8 == 0 && unit <= 1024;
  if (!vector) { unit = cg; lanes = 1; }
  auto set = [&](int64_t slab, int64_t room) {   // room: for what a block keeps on chip; true where the tiles fit
    const int64_t vectors = slab / lanes, tile = hw * slab * size;
    int threads = 64;
    while (threads < THREADS && (threads * 4 < vectors * hw || threads < vectors)) threads *= 2;
    p.teams = Teams(int(vectors < threads ? vectors : threads), threads);
    p.red_floats = p.teams.workspace(needs.sums, lanes);
    const int64_t rest = 4 * (p.red_floats + (vector ? needs.vectors : needs.scalars) * slab + 3 * (slab / cg));
    // Of few elements next to nothing is left of a gradient: the backward must not round its terms to the tile's dtype.
    p.resident = vector && p.teams.columns == vectors && hw * cg >= 32 && needs.tiles * tile + rest <= room;
    p.tile_bytes = p.resident ? int(tile) : 0;
    p.bytes = int(needs.tiles * p.tile_bytes + rest);
    p.slab = int(slab);
    return bool(p.resident);
  };
  auto enough = [&](int64_t slab) { return slab * size >= 64 && slab * hw >= 4096; };   // bytes of a row, work of a thread
  // The first slab that is enough and meets the conditions, else the widest that meets them, else 0. sectors: rows of whole 32-byte
  // sectors, where the sample's rows are not whole slabs anyway; others fetch a sector twice, but that is less than a second read.
  auto pick = [&](bool sectors, int64_t room) {
    int64_t best = 0;
    for (int64_t slab = unit; slab <= c && (slab == unit || slab <= MAX_SLAB); slab *= 2) {
      const bool whole = slab * size % 32 == 0 || 2 * slab > c;
      if ((sectors ? whole : slab * size >= 32 || 2 * slab > c) && (room == 0 || set(slab, room))) best = slab;
      if (best == slab && enough(slab)) break;
    }
    return best;
  };
  // On chip with two blocks on an SM, one of which computes while the other loads; then with one block, where its rows are whole
  // sectors: an SM of 100 KB holds no two blocks of a backward at 32x32. Both beat a second read; else that.
  const struct { bool sectors; int64_t room; } ways[] = {{true, half_shared()}, {false, half_shared()}, {true, block_shared()}, {true, 0}, {false, 0}};
  int64_t slab = 0, room = 0;
  for (int i = 0; i < 5 && slab == 0; i++) slab = pick(ways[i].sectors, room = ways[i].room);
  set(slab ? slab : unit, room);
  p.hw = int(hw); p.c1 = int(c1); p.c2 = int(c2); p.cg = int(cg); p.lanes = lanes;
  const int step = p.teams.rows * (lanes == 4 ? ROWS<4> : 1);
  p.span = int(((hw + step - 1) / step + GROUPS - 1) / GROUPS * step);
  p.slabs = int((c + p.slab - 1) / p.slab);
  return n * p.slabs <= INT32_MAX && p.bytes <= block_shared();
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
  const cudaError_t error = allow_shared(kernel);
  if (error != cudaSuccess) return (int)error;
  LAUNCH(kernel, dim3(unsigned(n * args.p.slabs)), dim3(args.p.teams.threads), args.p.bytes, (cudaStream_t)stream, args);
  return (int)cudaGetLastError();
}

template <int V, class T> __device__ __forceinline__ void copy_async(T* shared, const T* global) {
#pragma unroll
  for (int h = 0; h < V / Vec<T>::N; h++) copy16_async(shared + h * Vec<T>::N, global + h * Vec<T>::N);
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
    column = p.teams.column();
    row = p.teams.row();
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
    active = b.row < p.teams.rows && b.row < p.hw && k < b.width;
    second = c >= p.c1;
    const int width = second ? p.c2 : p.c1;
    offset = (b.n * p.hw + b.row) * width + (second ? c - p.c1 : c);
    whole = (b.n * p.hw + b.row) * (p.c1 + p.c2) + c;
    step = p.teams.rows * width;
    step_whole = p.teams.rows * (p.c1 + p.c2);
  }
};

// Philox bits of the V elements of the thread's next ROWS rows: one call for eight of them. Two neighbouring threads of four
// channels have two blocks of eight in two rows: each draws one and gives the other its half. KEYS: these stay in registers.
template <int V, bool KEYS = true> struct Mask {
  RoundKeys keys;
  uint64_t seed = 0;
  uint32_t next = 0, step = 0, layer, limit;    // counter of the block to draw; between draws
  uint64_t index = 0, index_step = 0;         // V = 1: the element's place in the global batch; between rows
  bool on, odd = false;
  int first = 0;                        // V = 1: the element's place in its block
  uint4 bits = {};
  __device__ Mask(const Drop& d, const Layout& p, const Block& b, int c) : layer(d.layer), limit(d.limit), on(d.seed != nullptr) {
    if (!on) return;
    const uint32_t rows = p.teams.rows;
    seed = (uint64_t)*d.seed;
    keys = RoundKeys(seed);
    index = (uint64_t((d.n0 ? *d.n0 : 0) + b.n) * p.hw + b.row) * (p.c1 + p.c2) + c;
    index_step = uint64_t(rows) * (p.c1 + p.c2);
    odd = V == 4 && (b.column & 1);
    next = uint32_t(index >> 3) + (odd ? uint32_t(index_step >> 3) : 0u);
    step = ROWS<V> * uint32_t(index_step >> 3);
  }
  __device__ __forceinline__ void draw() {
    if constexpr (V == 1) {
      next = uint32_t(index >> 3);
      first = int(index & 7);
      index += index_step;
    }
    bits = philox(KEYS ? keys : RoundKeys(anew(seed)), next, layer);
    next += step;
    if constexpr (V == 4) {
      const unsigned pair = 3u << (threadIdx.x & 30);
      const uint32_t low = __shfl_xor_sync(pair, odd ? bits.x : bits.z, 1), high = __shfl_xor_sync(pair, odd ? bits.y : bits.w, 1);
      bits = odd ? make_uint4(low, high, bits.z, bits.w) : make_uint4(bits.x, bits.y, low, high);
    }
  }
  // Element j of row r of those drawn for.
  __device__ __forceinline__ bool keep(int r, int j) const { return keep8(bits, V == 1 ? first : r * V + j, limit); }
};

}  // namespace gn
