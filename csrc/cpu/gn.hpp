// GroupNorm -> affine -> SiLU -> dropout over channels-last rows: what group_norm_silu.cpp and residual_group_norm_silu.cpp
// share. Formulas: kernels/ect_kernels/group_norm_silu.py and residual_group_norm_silu.py.
//
// A thread has whole samples. In each direction it goes through a sample twice, the second time in cache: by blocks of rows,
// and in a block by strips of neighbouring channels from its first row to its last, so that what belongs to a channel stays in
// registers. Moments are summed in fp64, as differences from a channel's first value. Gradients are summed in fp32 within a
// block and in fp64 over the blocks.
#pragma once
#include <algorithm>
#include <type_traits>
#include "cpu.hpp"

// The loop over the channels of a strip. They are independent of each other, which the compiler need not prove, and it must not
// unroll the loop before it has made vectors of it.
#define LANES(j, W) _Pragma("GCC ivdep") _Pragma("GCC unroll 1") for (int j = 0; j < W; j++)

namespace gn {

constexpr int STRIP = 16;         // channels of a strip: floats of the widest vector, and of a line of cache
constexpr int64_t BLOCK = 4096;   // values of a block, about
constexpr int64_t MAX_GROUP = 4096, MAX_CHANNELS = 1 << 22;

// n samples of hw rows; channels of the first and of the second source, and of a group.
struct Shape {
  int64_t n, hw, c1, c2, cg;
  int64_t channels() const { return c1 + c2; }
  int64_t groups() const { return channels() / cg; }
  int64_t rows() const { return std::min(hw, std::clamp<int64_t>(BLOCK / channels(), 4, 64)); }   // of a block
};
// False where the sizes are not supported.
inline bool shape(Shape& s, int64_t n, int64_t hw, int64_t c1, int64_t c2, int64_t groups) {
  const int64_t c = c1 + c2;
  s = {n, hw, c1, c2, groups < 1 ? 0 : c / groups};
  return n >= 0 && hw >= 1 && c1 >= 1 && c2 >= 0 && groups >= 1 && c % groups == 0 && s.cg <= MAX_GROUP && c <= MAX_CHANNELS && hw <= INT32_MAX / c;
}

// seed null: nothing is dropped; n0 null: 0.
struct Drop { const int64_t *seed, *n0; uint32_t threshold, layer; float inv_keep; };

// scale, shift, v: [n, c] or null; the rows of two samples are `stride` apart in scale and shift, and v_stride in v. The affine
// map is z = (x_hat * gamma + beta) * (1 + scale) + shift.
struct Affine {
  const float *gamma, *beta, *scale, *shift, *v; int64_t v_stride, stride;
  float factor(int64_t n, int64_t c) const { return scale ? 1.f + scale[n * stride + c] : 1.f; }
  float gain(int64_t n, int64_t c) const { return gamma[c] * factor(n, c); }
  float add(int64_t n, int64_t c) const { return v ? v[n * v_stride + c] : 0.f; }
  float bias(int64_t n, int64_t c) const { return beta[c] * factor(n, c) + (shift ? shift[n * stride + c] : 0.f); }
};

struct Forward {
  Shape s; Drop drop; Affine affine; bool act; double eps;
  const void *x, *other;   // sources of the norm
  void* y; float *mean, *rstd;
  const void *a, *skip; const float *bias, *skip_bias; void* sum; float skip_scale;   // residual only; a null: x is no sum
};
struct Backward {
  Shape s; Drop drop; Affine affine; bool act;
  const void *dy, *x, *other; const float *mean, *rstd;
  void *dx, *dother; float *rows, *dv, *dscale, *dshift;   // rows: gradients of gamma and beta, and of the bias where residual
  const void *dx_in, *djoined; float skip_scale; bool residual;   // residual only; gradients that came by another way, or null
};

// Calls f(width, k) for strips k ... k + width of c channels; the width is a constant of its type.
template <class F> inline void strips(int64_t c, const F& f) {
  int64_t k = 0;
  for (; k + STRIP <= c; k += STRIP) f(std::integral_constant<int, STRIP>(), k);
  for (; k < c; k++) f(std::integral_constant<int, 1>(), k);
}
// Calls f(first row, how many) for the blocks of a sample.
template <class F> inline void blocks(const Shape& s, const F& f) {
  for (int64_t row = 0; row < s.hw; row += s.rows()) f(row, std::min(s.rows(), s.hw - row));
}
// Calls f with constants in place of flags.
template <class F> inline void constants(bool a, bool b, const F& f) {
  const std::true_type yes; const std::false_type no;
  if (a) b ? f(yes, yes) : f(yes, no);
  else b ? f(no, yes) : f(no, no);
}

// Some rows of one source: `own` channels, which begin at `first` of all. The pointers are those of its first row and channel;
// an array by all channels is `all` long, and so is the step from row to row in tensors of all channels.
struct Rows { int64_t count, own, first, all; };

// Room of a thread: arrays by channel, and what a block's values are multiplied by.
struct Room {
  const Shape& s; const Drop& drop;
  std::vector<double> sums;
  std::vector<float> vectors, factor, tile;
  std::vector<uint32_t> words;
  Room(const Shape& s_, const Drop& d)
      : s(s_), drop(d), sums(4 * s_.channels()), vectors(6 * s_.channels()), factor(d.seed ? s_.rows() * s_.channels() : 0),
        words(factor.size() / 2 + 8) {}
  double* sum(int i) { return sums.data() + i * s.channels(); }
  float* vector(int i) { return vectors.data() + i * s.channels(); }
  // The factors of a block, 0 where a value is dropped, or null.
  const float* draw(int64_t n, int64_t row, int64_t count) {
    if (!drop.seed) return nullptr;
    const uint64_t start = (uint64_t((drop.n0 ? *drop.n0 : 0) + n) * uint64_t(s.hw) + uint64_t(row)) * uint64_t(s.channels());
    dropout(uint64_t(*drop.seed), drop.layer, start, count * s.channels(), drop.threshold, drop.inv_keep, words.data(), factor.data());
    return factor.data();
  }
};

// sum = (a + bias + skip) * scale, rounded.
template <class T, class A> inline void add_up(const Rows& r, const A* a, const A* skip, const float* bias, float scale, T* sum) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    constants(skip != nullptr, false, [&](auto skips, auto) {
      for (int64_t i = k; i < k + r.count * r.own; i += r.own)
        LANES(j, W) {
          const float e = to_float(a[i + j]) + bias[k + j];
          sum[i + j] = from_float<T>((skips ? e + to_float(skip[i + j]) : e) * scale);
        }
    });
  });
}

// Adds to sums and squares the differences of x + v from their channel's pivot.
template <class T> inline void moments(const Rows& r, const T* x, const float* v, const float* pivot, double* sums, double* squares) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    double s[W] = {}, q[W] = {};
    for (const T *at = x + k, *end = at + r.count * r.own; at != end; at += r.own)
      LANES(j, W) {
        const double d = double(to_float(at[j]) + v[k + j]) - double(pivot[k + j]);
        s[j] += d;
        q[j] += d * d;
      }
    LANES(j, W) { sums[k + j] += s[j]; squares[k + j] += q[j]; }
  });
}

// 1 / (1 + e^-x) of a number, to about two ulp where x is not below 0; any number where x is NaN.
inline float logistic(float x) {
  const float t = x * -1.44269504f;   // e^-x = 2^t, of which the size is bounded as a whole number: a branch would be no vector
  const uint32_t size = std::min(bits_of(t) & 0x7fffffffu, 0x42fa0000u);   // 125
  const float bounded = float_of(size | (bits_of(t) & 0x80000000u));
  const float shifted = bounded + 12582912.f, r = bounded - (shifted - 12582912.f);   // the last bits of `shifted` are a whole number
  float p = 1.32764578e-3f;           // 2^r for |r| <= 1/2, to an ulp
  p = p * r + 9.67554122e-3f; p = p * r + 5.55071332e-2f; p = p * r + 2.40221197e-1f; p = p * r + 6.93146967e-1f; p = p * r + 1.f;
  return 1.f / (1.f + float_of(bits_of(p) + (bits_of(shifted) << 23)));
}

// y of z = ((x + v) - m) * w + add, the four arrays one after the other.
template <bool ACT, bool DROP, class T> inline void activate(const Rows& r, const T* x, const float* factor, const float* vectors, T* y) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *w = m + r.all, *add = w + r.all;
    for (int64_t i = 0; i < r.count; i++) {
      const T* from = x + i * r.own + k;
      const float* f = factor + i * r.all + k;
      T* to = y + i * r.all + k;
      LANES(j, W) {
        const float z = ((to_float(from[j]) + v[j]) - m[j]) * w[j] + add[j], e = ACT ? z * logistic(z) : z;
        to[j] = from_float<T>(!DROP ? e : f[j] != 0.f ? e * f[j] : 0.f);
      }
    }
  });
}

template <class T, class A> void forward(const Forward& f, int64_t n, Room& room) {
  const Shape& s = f.s;
  const int64_t c = s.channels(), groups = s.groups();
  double *sums = room.sum(0), *squares = room.sum(1);
  float *v = room.vector(0), *m = room.vector(1), *w = room.vector(2), *add = room.vector(3), *pivot = room.vector(4), *bias = room.vector(5);
  std::fill(sums, sums + 2 * c, 0.);
  for (int64_t k = 0; k < c; k++) {
    v[k] = f.affine.add(n, k);
    bias[k] = (f.bias && k < s.c1 ? f.bias[k] : 0.f) + (f.skip_bias && k < s.c1 ? f.skip_bias[k] : 0.f);
  }
  const T* const x = static_cast<const T*>(f.x) + n * s.hw * s.c1;
  const T* const other = s.c2 ? static_cast<const T*>(f.other) + n * s.hw * s.c2 : nullptr;
  const auto measure = [&](const Rows& r, const T* from, bool begins) {
    if (begins) for (int64_t k = 0; k < r.own; k++) pivot[r.first + k] = to_float(from[k]) + v[r.first + k];
    moments(r, from, v + r.first, pivot + r.first, sums + r.first, squares + r.first);
  };
  blocks(s, [&](int64_t row, int64_t count) {
    const Rows one = {count, s.c1, 0, c}, two = {count, s.c2, s.c1, c};
    if (f.a) {
      const int64_t at = (n * s.hw + row) * s.c1;
      const A *a = static_cast<const A*>(f.a) + at, *skip = f.skip ? static_cast<const A*>(f.skip) + at : nullptr;
      add_up(one, a, skip, bias, f.skip_scale, static_cast<T*>(f.sum) + at);
    }
    measure(one, x + row * s.c1, row == 0);
    if (other) measure(two, other + row * s.c2, row == 0);
  });
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * s.cg, end = begin + s.cg;
    double mean = 0., m2 = 0.;
    for (int64_t k = begin; k < end; k++) {
      const double from = sums[k] / double(s.hw);
      squares[k] -= sums[k] * from;   // about the channel's mean
      sums[k] = double(pivot[k]) + from;
      mean += sums[k];
    }
    mean /= double(s.cg);
    for (int64_t k = begin; k < end; k++) m2 += squares[k] + double(s.hw) * (sums[k] - mean) * (sums[k] - mean);
    const double rstd = 1. / std::sqrt(m2 / double(s.hw * s.cg) + f.eps);
    f.mean[n * groups + g] = float(mean);
    f.rstd[n * groups + g] = float(rstd);
    for (int64_t k = begin; k < end; k++) {
      const double gain = rstd * double(f.affine.gain(n, k));
      m[k] = float(mean);
      w[k] = float(gain);
      add[k] = float(double(f.affine.bias(n, k)) + (double(m[k]) - mean) * gain);   // what rounding takes from a large mean
    }
  }
  blocks(s, [&](int64_t row, int64_t count) {
    const float* factor = room.draw(n, row, count);
    T* y = static_cast<T*>(f.y) + (n * s.hw + row) * c;
    constants(f.act, factor != nullptr, [&](auto act, auto drop) {
      activate<act.value, drop.value>({count, s.c1, 0, c}, x + row * s.c1, factor, v, y);
      if (other) activate<act.value, drop.value>({count, s.c2, s.c1, c}, other + row * s.c2, factor + s.c1, v + s.c1, y + s.c1);
    });
  });
}

// From the gradient du at SiLU's argument: du * weight to tile, to sums those of du, du x_hat and x_hat over the rows. vectors: v,
// m, rstd, gain and bias of z = x_hat * gain + bias, weight.
template <bool ACT, bool DROP, class T> inline void differentiate(const Rows& r, const T* x, const T* dy, const float* factor, const float* vectors, float* tile, double* sums) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *rstd = m + r.all, *gain = rstd + r.all, *bias = gain + r.all, *weight = bias + r.all;
    float s0[W] = {}, s1[W] = {}, s2[W] = {};
    for (int64_t i = 0; i < r.count; i++) {
      const T *from = x + i * r.own + k, *d = dy + i * r.all + k;
      const float* f = factor + i * r.all + k;
      float* to = tile + i * r.own + k;
      LANES(j, W) {
        const float e = ((to_float(from[j]) + v[j]) - m[j]) * rstd[j], z = e * gain[j] + bias[j], s = ACT ? logistic(z) : 1.f;
        const float all = to_float(d[j]), kept = !DROP ? all : f[j] != 0.f ? all * f[j] : 0.f;
        const float du = ACT ? kept * (s * (1.f + z * (1.f - s))) : kept;
        to[j] = du * weight[j];
        s0[j] += du;
        s1[j] += du * e;
        s2[j] += e;
      }
    }
    double *t0 = sums + k, *t1 = t0 + r.all, *t2 = t1 + r.all;
    LANES(j, W) { t0[j] += double(s0[j]); t1[j] += double(s1[j]); t2[j] += double(s2[j]); }
  });
}

// out = scale * (tile - (c1 + ((x + v) - m) * c2) + more), and to sums those of more = dx_in + djoined, where these are given.
// vectors: v, m, c1, c2.
template <bool ADDS, bool JOINS, class T, class O> inline void finish(const Rows& r, const T* x, const float* tile, const T* dx_in, const T* djoined, const float* vectors, float scale, O* out, double* sums) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *c1 = m + r.all, *c2 = c1 + r.all;
    float s[W] = {};
    for (int64_t i = 0; i < r.count; i++) {
      const int64_t at = i * r.own + k, whole = i * r.all + k;
      LANES(j, W) {
        float more = 0.f;
        if (ADDS) more += to_float(dx_in[at + j]);
        if (JOINS) more += to_float(djoined[whole + j]);
        const float d = tile[at + j] - (c1[j] + ((to_float(x[at + j]) + v[j]) - m[j]) * c2[j]);
        out[at + j] = from_float<O>(scale * (d + more));
        if (ADDS || JOINS) s[j] += more;
      }
    }
    if (ADDS || JOINS) LANES(j, W) sums[k + j] += double(s[j]);
  });
}

// A: type of dx.
template <class T, class A> void backward(const Backward& f, int64_t n, Room& room) {
  const Shape& s = f.s;
  const int64_t c = s.channels(), groups = s.groups(), plane = s.n * c;
  double *s0 = room.sum(0), *s1 = room.sum(1), *s2 = room.sum(2), *more = room.sum(3);
  std::fill(s0, s0 + 4 * c, 0.);
  float *v = room.vector(0), *m = room.vector(1), *rstd = room.vector(2), *gain = room.vector(3), *bias = room.vector(4), *weight = room.vector(5);
  for (int64_t k = 0; k < c; k++) {
    const int64_t g = n * groups + k / s.cg;
    v[k] = f.affine.add(n, k); m[k] = f.mean[g]; rstd[k] = f.rstd[g];
    gain[k] = f.affine.gain(n, k); bias[k] = f.affine.bias(n, k); weight[k] = gain[k] * rstd[k];
  }
  const T* const x = static_cast<const T*>(f.x) + n * s.hw * s.c1;
  const T* const other = s.c2 ? static_cast<const T*>(f.other) + n * s.hw * s.c2 : nullptr;
  A* const dx = static_cast<A*>(f.dx) + n * s.hw * s.c1;
  T* const dother = other ? static_cast<T*>(f.dother) + n * s.hw * s.c2 : nullptr;
  // What the first pass found is kept in fp32 for the second pass, in the place of the result where that is fp32.
  float *tile = reinterpret_cast<float*>(dx), *tile_other = reinterpret_cast<float*>(dother);
  if (!std::is_same_v<A, float> || !std::is_same_v<T, float>) {
    room.tile.resize(s.hw * c);
    tile = room.tile.data();
    tile_other = tile + s.hw * s.c1;
  }
  blocks(s, [&](int64_t row, int64_t count) {
    const float* factor = room.draw(n, row, count);
    const T* dy = static_cast<const T*>(f.dy) + (n * s.hw + row) * c;
    constants(f.act, factor != nullptr, [&](auto act, auto drop) {
      differentiate<act.value, drop.value>({count, s.c1, 0, c}, x + row * s.c1, dy, factor, v, tile + row * s.c1, s0);
      if (other) differentiate<act.value, drop.value>({count, s.c2, s.c1, c}, other + row * s.c2, dy + s.c1, factor + s.c1, v + s.c1, tile_other + row * s.c2, s0 + s.c1);
    });
  });
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * s.cg, end = begin + s.cg;
    const double count = double(s.hw * s.cg);
    double c1 = 0., c2 = 0., c3 = 0.;   // means over the group of weight du, weight du x_hat and x_hat
    for (int64_t k = begin; k < end; k++) {
      c1 += double(weight[k]) * s0[k];
      c2 += double(weight[k]) * s1[k];
      c3 += s2[k];
    }
    c1 /= count; c2 /= count; c3 /= count;
    c2 -= c3 * c1;   // c3 is 0 but for the rounding of a large mean: x_hat - c3 has lost nothing to it
    for (int64_t k = begin; k < end; k++) {
      const double factor = double(f.affine.factor(n, k)), scaled = s1[k] - c3 * s0[k];
      const int64_t at = n * c + k;
      f.rows[at] = float(factor * scaled);
      f.rows[plane + at] = float(factor * s0[k]);
      if (f.dscale) f.dscale[at] = float(double(f.affine.gamma[k]) * scaled + double(f.affine.beta[k]) * s0[k]);
      if (f.dshift) f.dshift[at] = float(s0[k]);
      s0[k] = double(weight[k]) * s0[k] - double(s.hw) * c1 - c2 * (s2[k] - double(s.hw) * c3);   // the sum of dx
      if (f.dv) f.dv[at] = float(s0[k]);
      gain[k] = float(c2 * double(rstd[k]));   // the array is that of the second pass from here on, and so is rstd
      rstd[k] = float(c1 - c2 * c3);
    }
  }
  blocks(s, [&](int64_t row, int64_t count) {
    const int64_t at = n * s.hw + row;
    const T* dx_in = f.dx_in ? static_cast<const T*>(f.dx_in) + at * s.c1 : nullptr;
    const T* djoined = f.djoined ? static_cast<const T*>(f.djoined) + at * c : nullptr;
    constants(dx_in != nullptr, djoined != nullptr, [&](auto adds, auto joins) {
      finish<adds.value, joins.value>({count, s.c1, 0, c}, x + row * s.c1, tile + row * s.c1, dx_in, djoined, v, f.skip_scale, dx + row * s.c1, more);
      if (other) finish<false, joins.value>({count, s.c2, s.c1, c}, other + row * s.c2, tile_other + row * s.c2, static_cast<const T*>(nullptr), joins ? djoined + s.c1 : nullptr, v + s.c1, 1.f, dother + row * s.c2, more + s.c1);
    });
  });
  if (f.residual)
    for (int64_t k = 0; k < c; k++) f.rows[2 * plane + n * c + k] = k < s.c1 ? float(double(f.skip_scale) * (more[k] + s0[k])) : 0.f;
}

// Calls run(sample, room) for every sample, those of a thread with the same room.
template <class P, class F> inline void samples(const P& f, const void* threads, const F& run) {
  parallel(threads, f.s.n, f.s.hw * f.s.channels(), [&](int64_t begin, int64_t end) {
    Room room(f.s, f.drop);
    for (int64_t n = begin; n < end; n++) run(n, room);
  });
}

}  // namespace gn
