// Forward of GroupNorm -> affine -> SiLU -> dropout. RESIDUAL: the first source is computed here, as (a + bias + skip) * scale, where a is given.
#pragma once
#include "gn.cuh"

namespace gn {

// Of one channel, over the rows of x + v seen so far and less its pivot: mean and sum of squares about it.
template <int V> struct Welford {
  float count = 0.f, mean[V] = {}, m2[V] = {};
  __device__ __forceinline__ void add(const float (&x)[V], const float (&v)[V], const float (&pivot)[V]) {
    count += 1.f;
    const float inverse = fast_inverse(count);   // its last bit is a last bit of the spread, no more
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float from = (x[j] + v[j]) - pivot[j], d = from - mean[j];
      mean[j] += d * inverse;
      m2[j] += d * (from - mean[j]);
    }
  }
};

// x of the residual op, from a and skip row by row, the next row on its way.
template <class T, class A, int V> struct Sum {
  const Forward& f;
  float bias[V];
  Run<A, V> a, skip = {};
  __device__ Sum(const Forward& f_, int c) : f(f_) {
#pragma unroll
    for (int j = 0; j < V; j++) bias[j] = (f.bias ? f.bias[c + j] : 0.f) + (f.skip_bias ? f.skip_bias[c + j] : 0.f);
  }
  __device__ __forceinline__ void request(int64_t at) {
    a = fetch<true, V>(static_cast<const A*>(f.a) + at);
    if (f.skip) skip = fetch<true, V>(static_cast<const A*>(f.skip) + at);
  }
  __device__ __forceinline__ void result(float (&e)[V]) const {   // rounded as it is written
    float s[V] = {};
    unpack<A, V>(a, e);
    if (f.skip) unpack<A, V>(skip, s);
#pragma unroll
    for (int j = 0; j < V; j++) e[j] = to_float(from_float<T>((e[j] + bias[j] + s[j]) * f.skip_scale));
  }
};

// A: type of a and skip.
template <class T, int V, bool RESIDENT, bool RESIDUAL, class A = T> __device__ __forceinline__ void forward(const Forward& f) {
  const Layout& p = f.p;
  const Block b(p);
  SHARED_DYN(unsigned char, shared);
  T* tile = reinterpret_cast<T*>(shared);
  float* red = reinterpret_cast<float*>(shared + p.tile_bytes);
  float* sums = red + p.red_floats;      // [3][slab]: sum, sum of squares about the mean, sum about the mean; then sums[0] is m
  float* pivots = sums + 3 * p.slab;     // [slab]: a channel's first x + v
  float* gains = pivots + p.slab;        // [slab] where V > 1: the affine map; then that of (x + v) - m
  float* biases = gains + p.slab;        // likewise
  float* stats = V > 1 ? biases + p.slab : gains;   // [2][groups of the slab]: mean less the pivot of the group's first channel, rstd
  const int c_all = p.c1 + p.c2, groups = b.width / p.cg, rows = p.teams.rows, slot_step = rows * p.teams.columns * V;
  const float inverse_hw = 1.f / p.hw;
  const T* x = static_cast<const T*>(f.x);
  const T* other = static_cast<const T*>(f.other);
  T* y = static_cast<T*>(f.y);
  auto is_computed = [&](const Channels<V>& ch) { return RESIDUAL && f.a != nullptr && !ch.second; };

  if constexpr (RESIDENT) {
    const Channels<V> ch(p, b, 0);
    if (ch.active && !is_computed(ch)) {
      const T* from = (ch.second ? other : x) + ch.offset;
      T* mine = tile + (b.row * p.teams.columns + b.column) * V;
      for (int group = 0, row = b.row; group < GROUPS; group++) {
        for (const int end = p.end(group); row < end; row += rows, from += ch.step, mine += slot_step) copy_async<V>(mine, from);
        copy_commit();
      }
    }
  }
  if constexpr (V > 1) {
    for (int k = threadIdx.x; k < b.width; k += blockDim.x) {   // while the rows are on their way
      gains[k] = f.affine.gain(b.n, b.c0 + k);
      biases[k] = f.affine.bias(b.n, b.c0 + k);
    }
  }

  for (int first = 0; first < b.width; first += p.teams.columns * V) {
    const Channels<V> ch(p, b, first);
    const int width = ch.second ? p.c2 : p.c1;
    // Welford over the thread's rows of x + v, rounded as it is below, then Chan's formula over all threads of a channel. All of
    // it, and the group's mean, is of differences from the channel's first element: no larger than the spread, so no digits are
    // lost to a large mean.
    Welford<V> own;
    if (ch.active) {
      float pivot[V], v[V] = {};
      const int64_t top = ch.offset - int64_t(b.row) * width;
      T* mine = tile + (b.row * p.teams.columns + b.column) * V;
      auto begin = [&] {
#pragma unroll
        for (int j = 0; j < V; j++) {
          if (!RESIDUAL) v[j] = f.affine.add(b.n, ch.c + j);
          pivot[j] += v[j];
        }
        if (b.row == 0) store(pivots + ch.k, pivot);
      };
      if (is_computed(ch)) {
        Sum<T, A, V> sum(f, ch.c);
        sum.request(top);
        sum.result(pivot);
        begin();
        int64_t at = ch.offset;
        sum.request(at);
#pragma unroll 1
        for (int row = b.row; row < p.hw; row += rows, at += ch.step, mine += slot_step) {
          float e[V];
          sum.result(e);
          if (row + rows < p.hw) sum.request(at + ch.step);
          store<true>(static_cast<T*>(f.x_out) + at, e);
          if constexpr (RESIDENT) store(mine, e);
          own.add(e, v, pivot);
        }
      } else {
        const T* from = (ch.second ? other : x) + ch.offset;
        load<true>(from - int64_t(b.row) * width, pivot);
        begin();
        if constexpr (RESIDENT) {
#pragma unroll 1
          for (int group = 0, row = b.row; group < GROUPS; group++) {
            const int end = p.end(group);
            copy_wait_but(GROUPS - 1 - group);
#pragma unroll 1
            for (; row < end; row += rows, mine += slot_step) {
              float e[V];
              load<false>(mine, e);
              own.add(e, v, pivot);
            }
          }
        } else {
          Run<T, V> next = fetch<true, V>(from);
#pragma unroll 1
          for (int row = b.row; row < p.hw; row += rows) {
            float e[V];
            unpack<T, V>(next, e);
            from += ch.step;
            if (row + rows < p.hw) next = fetch<true, V>(from);
            own.add(e, v, pivot);
          }
        }
      }
    }
    float total[1][V], q[2][V];
#pragma unroll
    for (int j = 0; j < V; j++) total[0][j] = own.count * own.mean[j];
    column_sums(total, p.teams, red, sums + first, p.slab, b.width - first);
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float d = ch.active ? own.mean[j] - sums[ch.k + j] * inverse_hw : 0.f;
      q[0][j] = own.m2[j] + own.count * d * d;
      q[1][j] = own.count * d;   // what rounding has left out of the mean
    }
    column_sums(q, p.teams, red, sums + p.slab + first, p.slab, b.width - first);
  }
  for (int k = threadIdx.x; k < b.width; k += blockDim.x)   // means, less the pivot of the group's first channel
    sums[k] = (sums[k] + sums[2 * p.slab + k]) * inverse_hw + (pivots[k] - pivots[k / p.cg * p.cg]);
  __syncthreads();
  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {   // a warp for each group
    const float *mean_c = sums + g * p.cg, *m2_c = mean_c + p.slab;
    float mean = 0.f, m2 = 0.f;
    for (int i = threadIdx.x % 32; i < p.cg; i += 32) mean += mean_c[i];
    mean = warp_sum(mean) / p.cg;
    for (int i = threadIdx.x % 32; i < p.cg; i += 32) {
      const float d = mean_c[i] - mean;
      m2 += m2_c[i] + p.hw * (d * d);
    }
    const float rstd = 1.f / sqrtf(warp_sum(m2) / (float(p.hw) * p.cg) + f.eps);
    if (threadIdx.x % 32 != 0) continue;
    stats[g] = mean;
    stats[groups + g] = rstd;
    const int64_t at = b.n * (c_all / p.cg) + b.c0 / p.cg + g;
    f.mean[at] = pivots[g * p.cg] + mean;
    f.rstd[at] = rstd;
  }
  __syncthreads();
  auto affine = [&](int k, float gain, float bias, float& m, float& w, float& add) {   // z = ((x + v) - m) * w + add
    const int g = k / p.cg;
    float rest;
    subtract(pivots[g * p.cg], -stats[g], m, rest);
    w = stats[groups + g] * gain;
    add = bias - rest * w;
  };
  if constexpr (V > 1) {
    for (int k = threadIdx.x; k < b.width; k += blockDim.x) affine(k, gains[k], biases[k], sums[k], gains[k], biases[k]);
    __syncthreads();
  }

  for (int first = 0; first < b.width; first += p.teams.columns * V) {
    const Channels<V> ch(p, b, first);
    if (!ch.active) continue;
    float m[V], w[V], add[V], v[V];
    if constexpr (V > 1) {
      load<false>(sums + ch.k, m);
      load<false>(gains + ch.k, w);
      load<false>(biases + ch.k, add);
    } else {
      affine(ch.k, f.affine.gain(b.n, ch.c), f.affine.bias(b.n, ch.c), m[0], w[0], add[0]);
    }
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = RESIDUAL ? 0.f : f.affine.add(b.n, ch.c + j);
    Mask<V> mask(f.drop, p, b, ch.c);
    const T* from = (ch.second ? other : is_computed(ch) ? static_cast<const T*>(f.x_out) : x) + ch.offset;
    T* to = y + ch.whole;
    const T* mine = tile + (b.row * p.teams.columns + b.column) * V;
    Run<T, V> next;
    if constexpr (!RESIDENT) next = fetch<!RESIDUAL, V>(from);   // residual: written above, by this very thread
#pragma unroll 1
    for (int row = b.row; row < p.hw;) {
      if (mask.on) mask.draw();
#pragma unroll
      for (int r = 0; r < ROWS<V> && (r == 0 || row < p.hw); r++, row += rows, to += ch.step_whole) {
        float e[V];
        if constexpr (RESIDENT) {
          load<false>(mine, e);
          mine += slot_step;
        } else {
          unpack<T, V>(next, e);
          from += ch.step;
          if (row + rows < p.hw) next = fetch<!RESIDUAL, V>(from);
        }
#pragma unroll
        for (int j = 0; j < V; j++) e[j] = ((e[j] + v[j]) - m[j]) * w[j] + add[j];
        if (f.act) {
#pragma unroll
          for (int j = 0; j < V; j++) e[j] *= sigmoid(e[j], f.drop.keep);
        } else {
#pragma unroll
          for (int j = 0; j < V; j++) e[j] *= f.drop.inv_keep;
        }
        if (mask.on) {
#pragma unroll
          for (int j = 0; j < V; j++) e[j] = mask.keep(r, j) ? e[j] : 0.f;
        }
        store<true>(to, e);
      }
    }
  }
}

}  // namespace gn
