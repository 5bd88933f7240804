// Backward of GroupNorm -> affine -> SiLU -> dropout; saved from the forward are its sources, mean and rstd alone.
#pragma once
#include "gn.cuh"

namespace gn {

// From x and dy of a thread's row to x_hat and keep * dz, in place. x_hat = ((x + v) - m) * rstd, z = x_hat * w + add.
template <int V, bool RESIDENT> struct Gradient {
  float m[V], rstd[V], w[V], add[V];
  const float *params, *v;   // of the first channel
  int slab;
  bool act;
  __device__ Gradient(const Backward& f, const float* params_, const Block& b, const Channels<V>& ch)
      : params(params_ + ch.k), v(nullptr), slab(f.p.slab), act(f.act) {
    if constexpr (V > 1) {
      load<false>(params, m);
      load<false>(params + slab, rstd);
      load<false>(params + 2 * slab, w);
      if (f.affine.v) v = params + 4 * slab;
    } else {
      const int64_t g = f.group(b.n, ch.c);
      m[0] = f.mean[g];
      rstd[0] = f.rstd[g];
      w[0] = f.affine.gain(b.n, ch.c);
      add[0] = f.affine.bias(b.n, ch.c);
      if (f.affine.v) v = f.affine.v + b.n * f.affine.v_stride + ch.c;
    }
  }
  // Read for every row, for registers are short; the more so where rows from global memory take some.
  __device__ __forceinline__ void refresh() {
    if constexpr (V > 1) load<false>(params + 3 * slab, add);
    if constexpr (V > 1 && !RESIDENT) { load<false>(params, m); load<false>(params + slab, rstd); }
  }
  // (x + v) - m, in this order: it is the mean of the rounded x + v that rounds as they do, and m - v would round too.
  __device__ __forceinline__ void centre(float (&x)[V]) const {
    if (v) {
      float more[V];
      load<false>(v, more);
#pragma unroll
      for (int j = 0; j < V; j++) x[j] += more[j];
    }
#pragma unroll
    for (int j = 0; j < V; j++) x[j] -= m[j];
  }
  template <class M> __device__ __forceinline__ void operator()(const M& mask, int r, float (&x)[V], float (&d)[V]) {
    if (mask.on) {
#pragma unroll
      for (int j = 0; j < V; j++) d[j] = mask.keep(r, j) ? d[j] : 0.f;
    }
    refresh();
    centre(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] *= rstd[j];
    if (act) {
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float z = x[j] * w[j] + add[j], s = sigmoid(z);
        d[j] *= s * (1.f + z * (1.f - s));
      }
    }
  }
};

// With z = x_hat * a + b and dz its gradient: dx = w dz - c1 - x_hat c2, w = a * rstd, c1 and c2 the group's means of w dz and w dz x_hat.
// Sums of dx over the rows follow from those of dz, dz x_hat and x_hat, with no further pass.
// A: type of a's gradient, here called dx.
template <class T, int V, bool RESIDENT, bool RESIDUAL, class A = T> __device__ __forceinline__ void backward(const Backward& f) {
  constexpr bool KEYS = RESIDENT && !RESIDUAL;   // else registers are short
  const Layout& p = f.p;
  const Block b(p);
  SHARED_DYN(unsigned char, shared);
  T* tile_x = reinterpret_cast<T*>(shared);
  T* tile_d = reinterpret_cast<T*>(shared + p.tile_bytes);
  float* red = reinterpret_cast<float*>(shared + 2 * p.tile_bytes);
  float* sums = red + p.red_floats;      // [3][slab]: sums over the rows of dz, dz x_hat, x_hat; then c1, c2, the sum of dx
  float* params = sums + 3 * p.slab;     // [5][slab] where V > 1: m, rstd, w, add, v of Gradient
  float* means = params + (V > 1 ? 5 : 0) * p.slab;   // [3][groups of the slab]: c1, c2, mean of x_hat
  const int c_all = p.c1 + p.c2, groups = b.width / p.cg, rows = p.teams.rows, slot_step = rows * p.teams.columns * V;
  const int slot = (b.row * p.teams.columns + b.column) * V;
  const T* dy = static_cast<const T*>(f.dy);
  auto source = [&](const Channels<V>& ch) { return static_cast<const T*>(ch.second ? f.other : f.x) + ch.offset; };

  if constexpr (RESIDENT) {
    const Channels<V> ch(p, b, 0);
    if (ch.active) {
      const T *x = source(ch), *d = dy + ch.whole;
      T *mine_x = tile_x + slot, *mine_d = tile_d + slot;
      for (int group = 0, row = b.row; group < GROUPS; group++) {
        for (const int end = p.end(group); row < end; row += rows, x += ch.step, d += ch.step_whole, mine_x += slot_step, mine_d += slot_step) {
          copy_async<V>(mine_x, x);
          copy_async<V>(mine_d, d);
        }
        copy_commit();
      }
    }
  }
  if constexpr (V > 1) {
    for (int k = threadIdx.x; k < b.width; k += blockDim.x) {   // while the rows are on their way
      const int c = b.c0 + k;
      const int64_t g = f.group(b.n, c);
      params[k] = f.mean[g];
      params[p.slab + k] = f.rstd[g];
      params[2 * p.slab + k] = f.affine.gain(b.n, c);
      params[3 * p.slab + k] = f.affine.bias(b.n, c);
      params[4 * p.slab + k] = f.affine.add(b.n, c);
    }
    __syncthreads();
  }
  auto weight = [&](int k) { return V > 1 ? params[2 * p.slab + k] * params[p.slab + k] : f.affine.gain(b.n, b.c0 + k) * f.rstd[f.group(b.n, b.c0 + k)]; };

  for (int first = 0; first < b.width; first += p.teams.columns * V) {
    const Channels<V> ch(p, b, first);
    float q[3][V] = {};
    if (ch.active) {
      Gradient<V, RESIDENT> gradient(f, params, b, ch);
      Mask<V, KEYS> mask(f.drop, p, b, ch.c);
      auto add = [&](int r, float (&e)[V], float (&d)[V]) {
        gradient(mask, r, e, d);
#pragma unroll
        for (int j = 0; j < V; j++) {
          q[0][j] += d[j];
          q[1][j] += d[j] * e[j];
          q[2][j] += e[j];
        }
      };
      if constexpr (RESIDENT) {
        const T* mine_x = tile_x + slot;
        T* mine_d = tile_d + slot;
#pragma unroll 1
        for (int group = 0, row = b.row; group < GROUPS; group++) {
          const int end = p.end(group);
          copy_wait_but(GROUPS - 1 - group);
#pragma unroll 1
          while (row < end) {
            if (mask.on) mask.draw();
#pragma unroll
            for (int r = 0; r < ROWS<V> && (r == 0 || row < end); r++, row += rows, mine_x += slot_step, mine_d += slot_step) {
              float e[V], d[V];
              load<false>(mine_x, e);
              load<false>(mine_d, d);
              add(r, e, d);
              store(mine_d, d);   // dz, which fits where dy does; dx's own term need not where a group hardly varies
            }
          }
        }
      } else {
        const T *x = source(ch), *from = dy + ch.whole;
        Run<T, V> next_x = fetch<true, V>(x), next_d = fetch<true, V>(from);
#pragma unroll 1
        for (int row = b.row; row < p.hw;) {
          if (mask.on) mask.draw();
#pragma unroll
          for (int r = 0; r < ROWS<V> && (r == 0 || row < p.hw); r++) {
            float e[V], d[V];
            unpack<T, V>(next_x, e);
            unpack<T, V>(next_d, d);
            row += rows; x += ch.step; from += ch.step_whole;
            if (row < p.hw) { next_x = fetch<true, V>(x); next_d = fetch<true, V>(from); }
            add(r, e, d);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < V; j++) { q[0][j] *= f.drop.inv_keep; q[1][j] *= f.drop.inv_keep; }
    }
    column_sums(q, p.teams, red, sums + first, p.slab, b.width - first);
  }
  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    float c1 = 0.f, c2 = 0.f, c3 = 0.f;
    for (int i = threadIdx.x % 32; i < p.cg; i += 32) {
      const int k = g * p.cg + i;
      c1 += weight(k) * sums[k];
      c2 += weight(k) * sums[p.slab + k];
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
    const float dv = weight(k) * s0 - p.hw * c1 - c2 * s2;
    if (f.dv) f.dv[nc] = dv;
    sums[k] = c1 - c2 * c3;
    sums[p.slab + k] = c2;
    sums[2 * p.slab + k] = dv;
  }
  __syncthreads();

  for (int first = 0; first < b.width; first += p.teams.columns * V) {
    const Channels<V> ch(p, b, first);
    float q[1][V] = {};
    void* wanted = ch.second ? f.dother : f.dx;
    const bool adds = RESIDUAL && !ch.second && f.dx_in != nullptr, joins = RESIDUAL && f.djoined != nullptr;
    if (ch.active && (wanted != nullptr || adds)) {
      Gradient<V, RESIDENT> gradient(f, params, b, ch);
      float c1[V], c2[V];
      auto load_means = [&] { load<false>(sums + ch.k, c1); load<false>(sums + p.slab + ch.k, c2); };
      if constexpr (RESIDENT) load_means();
      Mask<V, KEYS> mask(f.drop, p, b, ch.c);
      const float factor = RESIDUAL && !ch.second ? f.skip_scale : 1.f;
      int64_t at = ch.offset, whole = ch.whole;
      const T *x = static_cast<const T*>(ch.second ? f.other : f.x), *mine_x = tile_x + slot, *mine_d = tile_d + slot;
      // The row after this one is on its way, but where four tensors of two vectors each would take too many registers.
      constexpr bool AHEAD = RESIDENT || V * sizeof(T) <= 16;
      Run<T, V> next_x, next_d, next_in = {}, next_joined = {};
      auto request = [&] {
        if constexpr (!RESIDENT) { next_x = fetch<true, V>(x + at); next_d = fetch<true, V>(dy + whole); }
        if (adds) next_in = fetch<true, V>(static_cast<const T*>(f.dx_in) + at);
        if (joins) next_joined = fetch<true, V>(static_cast<const T*>(f.djoined) + whole);
      };
      if (AHEAD) request();
#pragma unroll 1
      for (int row = b.row; row < p.hw;) {
        if (!RESIDENT && mask.on) mask.draw();
#pragma unroll
        for (int r = 0; r < ROWS<V> && (r == 0 || row < p.hw); r++) {
          float e[V], d[V], more[V] = {};
          if (!AHEAD) request();
          if (adds) unpack<T, V>(next_in, more);
          if (joins) {
            float joined[V];
            unpack<T, V>(next_joined, joined);
#pragma unroll
            for (int j = 0; j < V; j++) more[j] += joined[j];
          }
          if constexpr (!RESIDENT) { unpack<T, V>(next_x, e); unpack<T, V>(next_d, d); }
          const int64_t to = at;
          row += rows; at += ch.step; whole += ch.step_whole;
          if (AHEAD && row < p.hw) request();
          if constexpr (RESIDENT) {
            load<false>(mine_x, e);
            load<false>(mine_d, d);
            mine_x += slot_step; mine_d += slot_step;
            gradient.centre(e);
#pragma unroll
            for (int j = 0; j < V; j++) e[j] *= gradient.rstd[j];
          } else {
            gradient(mask, r, e, d);
            load_means();   // for every row: registers are short
          }
#pragma unroll
          for (int j = 0; j < V; j++) d[j] = d[j] * gradient.w[j] * gradient.rstd[j];
#pragma unroll
          for (int j = 0; j < V; j++) {
            q[0][j] += more[j];
            d[j] = factor * (more[j] + (d[j] * f.drop.inv_keep - (c1[j] + e[j] * c2[j])));
          }
          if (wanted == nullptr) continue;
          if (ch.second) store<true>(static_cast<T*>(wanted) + to, d);
          else store<true>(static_cast<A*>(wanted) + to, d);
        }
      }
    }
    if (RESIDUAL && f.partials) column_sums(q, p.teams, red, sums + first, p.slab, b.width - first);
  }
  if constexpr (RESIDUAL) {
    for (int k = threadIdx.x; f.partials && k < b.width; k += blockDim.x)
      f.partials[2 * f.n * c_all + b.n * c_all + b.c0 + k] = b.c0 + k < p.c1 ? f.skip_scale * (sums[k] + sums[2 * p.slab + k]) : 0.f;
  }
}

}  // namespace gn
