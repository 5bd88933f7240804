// Backward of GroupNorm -> affine -> SiLU -> dropout; saved from the forward are its sources, mean and rstd alone.
#pragma once
#include "gn.cuh"

namespace gn {

// Takes x and dy of a thread's i-th row to x_hat and dz, in place.
template <int V> struct Gradient {
  float m[V], rstd[V], w[V], add[V], inv_keep;
  const float* v;   // in shared memory, read for every row: registers are short
  bool act;
  __device__ Gradient(const Backward& f, const float* params, const Channels<V>& ch)
      : inv_keep(f.drop.inv_keep), v(f.affine.v ? params + 4 * f.p.slab + ch.k : nullptr), act(f.act) {
    load<false>(params + ch.k, m);
    load<false>(params + f.p.slab + ch.k, rstd);
    load<false>(params + 2 * f.p.slab + ch.k, w);
    load<false>(params + 3 * f.p.slab + ch.k, add);
  }
  // ((x + v) - m) * rstd, in this order: it is the mean of the rounded x + v that rounds as they do, and m - v would round too.
  __device__ __forceinline__ void x_hat(float (&x)[V]) const {
    if (v) {
      float more[V];
      load<false>(v, more);
#pragma unroll
      for (int j = 0; j < V; j++) x[j] += more[j];
    }
#pragma unroll
    for (int j = 0; j < V; j++) x[j] = (x[j] - m[j]) * rstd[j];
  }
  __device__ __forceinline__ void operator()(Mask<V>& mask, int i, float (&x)[V], float (&d)[V]) const {
    if (mask.on) {
      mask.draw(i);
#pragma unroll
      for (int j = 0; j < V; j++) d[j] = mask.keep(j) ? d[j] * inv_keep : 0.f;
    }
    x_hat(x);
    if (!act) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float z = x[j] * w[j] + add[j], s = sigmoid(z);
      d[j] *= s * (1.f + z * (1.f - s));
    }
  }
};

// With z = x_hat * w + b and dz its gradient: dx = rstd * (w dz - c1 - x_hat c2), c1 and c2 the group's means of w dz and w dz x_hat.
// Sums of dx over the rows follow from those of dz, dz x_hat and x_hat, with no further pass.
// A: type of a's gradient, here called dx.
template <class T, int V, bool RESIDUAL, class A = T> __device__ __forceinline__ void backward(const Backward& f) {
  const Layout& p = f.p;
  const Block b(p);
  SHARED_DYN(unsigned char, shared);
  T* tile_x = reinterpret_cast<T*>(shared);
  T* tile_d = reinterpret_cast<T*>(shared + p.tile_bytes);
  float* red = reinterpret_cast<float*>(shared + 2 * p.tile_bytes);
  float* sums = red + p.red_floats;      // [3][slab]: sums over the rows of dz, dz x_hat, x_hat; then c1, c2, the sum of dx
  float* params = sums + 3 * p.slab;     // [5][slab]: x_hat = (x + params[4] - params[0]) * params[1], z = x_hat * params[2] + params[3]
  float* means = params + 5 * p.slab;    // [3][groups of the slab]: c1, c2, mean of x_hat
  const int c_all = p.c1 + p.c2, groups = b.width / p.cg;
  const T* dy = static_cast<const T*>(f.dy);

  if (p.resident) {
    const Channels<V> ch(p, b, 0);
    if (ch.active) {
      const T* x = static_cast<const T*>(ch.second ? f.other : f.x) + ch.offset;
      const T* d = dy + ch.whole;
      for (int row = b.row; row < p.hw; row += p.rows, x += ch.step, d += ch.step_whole) {
        const int slot = (row * p.columns + b.column) * V;
        copy_async<V>(tile_x + slot, x);
        copy_async<V>(tile_d + slot, d);
      }
    }
  }
  for (int k = threadIdx.x; k < b.width; k += blockDim.x) {
    const int c = b.c0 + k;
    const int64_t nc = b.n * c_all + c, g = b.n * (c_all / p.cg) + c / p.cg;
    params[k] = f.mean[g];
    params[p.slab + k] = f.rstd[g];
    params[4 * p.slab + k] = f.affine.add(b.n, c);
    params[2 * p.slab + k] = f.affine.gamma[c] * f.affine.factor(b.n, c);
    params[3 * p.slab + k] = f.affine.bias(b.n, c);
  }
  __syncthreads();

  for (int first = 0; first < b.width; first += p.columns * V) {
    const Channels<V> ch(p, b, first);
    float q[3][V] = {};
    if (ch.active) {
      const T* x = static_cast<const T*>(ch.second ? f.other : f.x) + ch.offset;
      const T* from = dy + ch.whole;
      const Gradient<V> gradient(f, params, ch);
      Mask<V> mask(f.drop, p, b, ch.c);
      if (p.resident) copy_wait();
#pragma unroll 1
      for (int row = b.row, i = 0; row < p.hw; row += p.rows, i++, x += ch.step, from += ch.step_whole) {
        float e[V], d[V];
        const int slot = (row * p.columns + b.column) * V;
        if (p.resident) { load<false>(tile_x + slot, e); load<false>(tile_d + slot, d); }
        else { load<true>(x, e); load<true>(from, d); }
        gradient(mask, i, e, d);
#pragma unroll
        for (int j = 0; j < V; j++) {
          q[0][j] += d[j];
          q[1][j] += d[j] * e[j];
          q[2][j] += e[j];
        }
        if (p.resident) {   // dx's own term, which fits its dtype where dx does; the sums above saw all digits of dz
#pragma unroll
          for (int j = 0; j < V; j++) d[j] = d[j] * gradient.w[j] * gradient.rstd[j];
          store(tile_d + slot, d);
        }
      }
    }
    column_sums(q, p.columns, p.rows, red, sums + first, p.slab, b.width - first);
  }
  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    float c1 = 0.f, c2 = 0.f, c3 = 0.f;
    for (int i = threadIdx.x % 32; i < p.cg; i += 32) {
      const int k = g * p.cg + i;
      c1 += params[2 * p.slab + k] * sums[k];
      c2 += params[2 * p.slab + k] * sums[p.slab + k];
      c3 += sums[2 * p.slab + k];
    }
    c1 = warp_sum(c1) / (float(p.hw) * p.cg);
    c2 = warp_sum(c2) / (float(p.hw) * p.cg);
    c3 = warp_sum(c3) / (float(p.hw) * p.cg);   // 0 but for the rounding of a large mean: x_hat - c3 has lost nothing to it
    if (threadIdx.x % 32 == 0) { means[g] = c1; means[groups + g] = c2 - c3 * c1; means[2 * groups + g] = c3; }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < b.width; k += blockDim.x) {
    const int c = b.c0 + k, g = k / p.cg;
    const int64_t nc = b.n * c_all + c, plane = f.n * c_all;
    const float c1 = means[g], c2 = means[groups + g], c3 = means[2 * groups + g];
    const float s0 = sums[k], s1 = sums[p.slab + k] - c3 * s0, factor = f.affine.factor(b.n, c);
    if (f.partials) { f.partials[nc] = factor * s1; f.partials[plane + nc] = factor * s0; }
    if (f.dscale) f.dscale[nc] = f.affine.gamma[c] * s1 + f.affine.beta[c] * s0;
    if (f.dshift) f.dshift[nc] = s0;
    const float s2 = sums[2 * p.slab + k] - p.hw * c3;
    const float dv = params[p.slab + k] * (params[2 * p.slab + k] * s0 - p.hw * c1 - c2 * s2);
    if (f.dv) f.dv[nc] = dv;
    sums[k] = c1 - c2 * c3;
    sums[p.slab + k] = c2;
    sums[2 * p.slab + k] = dv;
  }
  __syncthreads();

  for (int first = 0; first < b.width; first += p.columns * V) {
    const Channels<V> ch(p, b, first);
    float q[1][V] = {};
    void* wanted = ch.second ? f.dother : f.dx;
    const bool adds = RESIDUAL && !ch.second && f.dx_in != nullptr;
    if (ch.active && (wanted != nullptr || adds)) {
      const T* x = static_cast<const T*>(ch.second ? f.other : f.x) + ch.offset;
      const T* from = dy + ch.whole;
      const Gradient<V> gradient(f, params, ch);
      float c1[V], c2[V];
      load<false>(sums + ch.k, c1);
      load<false>(sums + p.slab + ch.k, c2);
      Mask<V> mask(f.drop, p, b, ch.c);
      int64_t at = ch.offset;
      const float factor = RESIDUAL && !ch.second ? f.skip_scale : 1.f;
#pragma unroll 1
      for (int row = b.row, i = 0; row < p.hw; row += p.rows, i++, x += ch.step, from += ch.step_whole, at += ch.step) {
        float e[V], d[V], more[V] = {};
        const int slot = (row * p.columns + b.column) * V;
        if (adds) load<true>(static_cast<const T*>(f.dx_in) + at, more);
        if (RESIDUAL && f.djoined) {
          float joined[V];
          load<true>(static_cast<const T*>(f.djoined) + (from - dy), joined);
#pragma unroll
          for (int j = 0; j < V; j++) more[j] += joined[j];
        }
        if (p.resident) {
          load<false>(tile_x + slot, e);
          load<false>(tile_d + slot, d);
          gradient.x_hat(e);
#pragma unroll
          for (int j = 0; j < V; j++) d[j] -= gradient.rstd[j] * (c1[j] + e[j] * c2[j]);
        } else {
          load<true>(x, e);
          load<true>(from, d);
          gradient(mask, i, e, d);
#pragma unroll
          for (int j = 0; j < V; j++) d[j] = gradient.rstd[j] * ((d[j] * gradient.w[j] - c1[j]) - e[j] * c2[j]);
        }
#pragma unroll
        for (int j = 0; j < V; j++) {
          q[0][j] += more[j];
          d[j] = factor * (more[j] + d[j]);
        }
        if (wanted == nullptr) continue;
        if (ch.second) store<true>(static_cast<T*>(wanted) + at, d);
        else store<true>(static_cast<A*>(wanted) + at, d);
      }
    }
    if (RESIDUAL && f.partials) column_sums(q, p.columns, p.rows, red, sums + first, p.slab, b.width - first);
  }
  if constexpr (RESIDUAL) {
    for (int k = threadIdx.x; f.partials && k < b.width; k += blockDim.x)
      f.partials[2 * f.n * c_all + b.n * c_all + b.c0 + k] = b.c0 + k < p.c1 ? f.skip_scale * (sums[k] + sums[2 * p.slab + k]) : 0.f;
  }
}

}  // namespace gn
