// Forward of GroupNorm -> affine -> SiLU -> dropout. RESIDUAL: the first source is computed here, as (a + bias + skip) * scale, where a is given.
#pragma once
#include "gn.cuh"

namespace gn {

// A: type of a and skip.
template <class T, int V, bool RESIDUAL, class A = T> __device__ __forceinline__ void forward(const Forward& f) {
  const Layout& p = f.p;
  const Block b(p);
  SHARED_DYN(unsigned char, shared);
  T* tile = reinterpret_cast<T*>(shared);
  float* red = reinterpret_cast<float*>(shared + p.tile_bytes);
  float* sums = red + p.red_floats;      // [3][slab]: sum, sum of squares about the mean, sum about the mean
  float* params = sums + 3 * p.slab;     // [3][slab]: z = (x - params[0]) * params[1] + params[2]
  float* pivots = params + 3 * p.slab;   // [slab]: a channel's first x + v
  float* stats = params + 4 * p.slab;    // [2][groups of the slab]: mean less the pivot of the group's first channel, rstd
  const int c_all = p.c1 + p.c2, groups = b.width / p.cg;
  const float inverse_hw = 1.f / p.hw;
  const T* x = static_cast<const T*>(f.x);
  const T* other = static_cast<const T*>(f.other);
  T* y = static_cast<T*>(f.y);

  for (int first = 0; first < b.width; first += p.columns * V) {
    const Channels<V> ch(p, b, first);
    const bool computed = RESIDUAL && f.a != nullptr && !ch.second;
    const T* source = ch.second ? other : x;
    const int width = ch.second ? p.c2 : p.c1;
    if (ch.active && p.resident && !computed) {
      const T* from = source + ch.offset;
      for (int row = b.row; row < p.hw; row += p.rows, from += ch.step)
        copy_async<V>(tile + (row * p.columns + b.column) * V, from);
    }
    // Welford over the thread's rows of x + v, rounded as it is below, then Chan's formula over all threads of a channel. All of
    // it, and the group's mean, is of differences from the channel's first element: no larger than the spread, so no digits are
    // lost to a large mean.
    float mean[V], q[2][V], count = 0.f, bias[V], pivot[V], v[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      v[j] = !RESIDUAL && ch.active ? f.affine.add(b.n, ch.c + j) : 0.f;
      mean[j] = q[0][j] = q[1][j] = 0.f;
      bias[j] = computed && ch.active ? (f.bias ? f.bias[ch.c + j] : 0.f) + (f.skip_bias ? f.skip_bias[ch.c + j] : 0.f) : 0.f;
    }
    auto compute = [&](int64_t at, float (&e)[V]) {   // x, rounded as it is written
      load<true>(static_cast<const A*>(f.a) + at, e);
      float s[V] = {};
      if (f.skip) load<true>(static_cast<const A*>(f.skip) + at, s);
#pragma unroll
      for (int j = 0; j < V; j++) e[j] = to_float(from_float<T>((e[j] + bias[j] + s[j]) * f.skip_scale));
    };
    if (ch.active) {
      int64_t at = ch.offset;
      if (computed) compute(at - int64_t(b.row) * width, pivot);
      else load<true>(source + at - int64_t(b.row) * width, pivot);
#pragma unroll
      for (int j = 0; j < V; j++) pivot[j] += v[j];
      if (b.row == 0) store(pivots + ch.k, pivot);
      if (p.resident && !computed) copy_wait();
      for (int row = b.row; row < p.hw; row += p.rows, at += ch.step) {
        float e[V];
        T* mine = tile + (row * p.columns + b.column) * V;
        if (computed) {
          compute(at, e);
          store<true>(static_cast<T*>(f.x_out) + at, e);
          if (p.resident) store(mine, e);
        } else if (p.resident) {
          load<false>(mine, e);
        } else {
          load<true>(source + at, e);
        }
        count += 1.f;
        const float inverse = __frcp_rn(count);
#pragma unroll
        for (int j = 0; j < V; j++) {
          const float from = (e[j] + v[j]) - pivot[j], d = from - mean[j];
          mean[j] += d * inverse;
          q[0][j] += d * (from - mean[j]);
        }
      }
    }
    float total[1][V];
#pragma unroll
    for (int j = 0; j < V; j++) total[0][j] = count * mean[j];
    column_sums(total, p.columns, p.rows, red, sums + first, p.slab, b.width - first);
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float d = ch.active ? mean[j] - sums[ch.k + j] * inverse_hw : 0.f;
      q[0][j] += count * d * d;
      q[1][j] = count * d;   // what rounding has left out of the mean
    }
    column_sums(q, p.columns, p.rows, red, sums + p.slab + first, p.slab, b.width - first);
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
  for (int k = threadIdx.x; k < b.width; k += blockDim.x) {
    const int c = b.c0 + k, g = k / p.cg;
    const int64_t nc = b.n * c_all + c;
    const float w = stats[groups + g] * f.affine.gamma[c] * f.affine.factor(b.n, c);
    float rest;
    subtract(pivots[g * p.cg], -stats[g], params[k], rest);
    params[p.slab + k] = w;
    params[2 * p.slab + k] = f.affine.bias(b.n, c) - rest * w;
  }
  __syncthreads();

  for (int first = 0; first < b.width; first += p.columns * V) {
    const Channels<V> ch(p, b, first);
    if (!ch.active) continue;
    float m[V], w[V], add[V], v[V];
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = RESIDUAL ? 0.f : f.affine.add(b.n, ch.c + j);
    load<false>(params + ch.k, m);
    load<false>(params + p.slab + ch.k, w);
    load<false>(params + 2 * p.slab + ch.k, add);
    Mask<V> mask(f.drop, p, b, ch.c);
    const bool computed = RESIDUAL && f.a != nullptr && !ch.second;
    const T* source = (ch.second ? other : computed ? static_cast<const T*>(f.x_out) : x) + ch.offset;
    T* to = y + ch.whole;
    for (int row = b.row, i = 0; row < p.hw; row += p.rows, i++, source += ch.step, to += ch.step_whole) {
      float e[V];
      if (p.resident) load<false>(tile + (row * p.columns + b.column) * V, e);
      else if (computed) load<false>(source, e);   // written above, by this very thread
      else load<true>(source, e);
#pragma unroll
      for (int j = 0; j < V; j++) e[j] = ((e[j] + v[j]) - m[j]) * w[j] + add[j];
      if (f.act) {
#pragma unroll
        for (int j = 0; j < V; j++) e[j] *= sigmoid(e[j]);
      }
      if (mask.on) {
        mask.draw(i);
#pragma unroll
        for (int j = 0; j < V; j++) e[j] = mask.keep(j) ? e[j] * f.drop.inv_keep : 0.f;
      }
      store<true>(to, e);
    }
  }
}

}  // namespace gn
