// GroupNorm -> affine -> SiLU -> dropout over channels-last rows: what group_norm_silu.cpp and residual_group_norm_silu.cpp
// share. Formulas: kernels/ect_kernels/group_norm_silu.py and residual_group_norm_silu.py.
//
// A thread has whole samples. In each direction it goes through a sample twice, the second time in cache: by blocks of rows,
// and in a block by strips of neighbouring channels from its first row to its last, so that what belongs to a channel stays in
// registers. Sums are fp32 within a block and fp64 over the blocks; moments are those of the differences from a channel's mean
// in the first block, since one value may lie far from the others. Images in half precision are widened and rounded a block at
// a time.
#pragma once
#include <algorithm>
#include <type_traits>
#include "cpu.hpp"

// The loop over the channels of a strip. They are independent of each other, which the compiler need not prove, and it must not
// unroll the loop before it has made vectors of it.
#if defined(__clang__)
#define LANES(j, W) _Pragma("clang loop vectorize(assume_safety)") for (int j = 0; j < W; j++)
#else
#define LANES(j, W) _Pragma("GCC ivdep") _Pragma("GCC unroll 1") for (int j = 0; j < W; j++)
#endif

namespace gn {

constexpr int STRIP = 16;         // channels of a strip: floats of the widest vector, and of a line of cache
constexpr int64_t BLOCK = 4096;   // values of a block, about
constexpr int64_t MAX_GROUP = 4096, MAX_CHANNELS = 1 << 22;

// n samples of hw rows of c channels, those of the two sources side by side; channels of a group, rows of a block.
struct Shape {
  int64_t n, hw, c, parts[2], groups, cg, rows;
  // False where the sizes are not supported.
  bool set(int64_t n_, int64_t hw_, int64_t c1, int64_t c2, int64_t groups_) {
    if (n_ < 0 || hw_ < 1 || c1 < 1 || c2 < 0 || groups_ < 1 || (c1 + c2) % groups_) return false;
    n = n_; hw = hw_; c = c1 + c2; parts[0] = c1; parts[1] = c2; groups = groups_; cg = c / groups;
    rows = std::min(hw, std::clamp<int64_t>(BLOCK / c, 4, 64));
    return cg <= MAX_GROUP && c <= MAX_CHANNELS && hw <= INT32_MAX / c;
  }
};

// Rows [n hw, c] of a dtype, or none. Some of them are read and written in fp32: where they lie, or in `room` where they are halves.
struct Image {
  const void* data; int64_t dtype, c;
  const float* read(int64_t row, int64_t count, std::vector<float>& room) const {
    float* const values = place(row, count, room);
    if (data && dtype == F16) for (int64_t i = 0; i < count * c; i++) values[i] = to_float(static_cast<const Half*>(data)[row * c + i]);
    if (data && dtype == BF16) for (int64_t i = 0; i < count * c; i++) values[i] = to_float(static_cast<const Brain*>(data)[row * c + i]);
    return values;
  }
  // Where the rows are to be written; then, these are rounded.
  float* place(int64_t row, int64_t count, std::vector<float>& room) const {
    if (!data) return nullptr;
    if (dtype == F32) return const_cast<float*>(static_cast<const float*>(data)) + row * c;
    room.resize(std::max<size_t>(room.size(), count * c));
    return room.data();
  }
  void round(int64_t row, int64_t count, const float* values) const {
    void* const to = const_cast<void*>(data);
    if (dtype == F16) for (int64_t i = 0; i < count * c; i++) static_cast<Half*>(to)[row * c + i] = from_float<Half>(values[i]);
    if (dtype == BF16) for (int64_t i = 0; i < count * c; i++) static_cast<Brain*>(to)[row * c + i] = from_float<Brain>(values[i]);
  }
};

// seed null: nothing is dropped; n0 null: 0.
struct Drop { const int64_t *seed, *n0; uint32_t threshold, layer; float inv_keep; };

// scale, shift, v: [n, c] or null; the rows of two samples are `stride` apart in scale and shift, and v_stride in v. The affine
// map is z = (x_hat * gamma + beta) * (1 + scale) + shift.
struct Affine {
  const float *gamma, *beta, *scale, *shift, *v; int64_t v_stride, stride;
  // Writes a sample's v, and gain and bias of z = x_hat * gain + bias.
  void write(int64_t n, int64_t c, float* RESTRICT v_, float* RESTRICT gain, float* RESTRICT bias) const {
    for (int64_t k = 0; k < c; k++) v_[k] = v ? v[n * v_stride + k] : 0.f;
    for (int64_t k = 0; k < c; k++) gain[k] = gamma[k] * (scale ? 1.f + scale[n * stride + k] : 1.f);
    for (int64_t k = 0; k < c; k++) bias[k] = scale ? beta[k] * (1.f + scale[n * stride + k]) + shift[n * stride + k] : beta[k];
  }
};

struct Forward {
  Shape s; Drop drop; Affine affine; bool act; double eps;
  Image sources[2], y; float *mean, *rstd;
  Image a, skip; const float *bias, *skip_bias; float skip_scale;   // residual only; of them the first source is made, if there is an a
};
struct Backward {
  Shape s; Drop drop; Affine affine; bool act;
  Image dy, sources[2]; const float *mean, *rstd;
  Image grads[2]; float *rows, *dv, *dscale, *dshift;   // rows: gradients of gamma and beta, and of the bias where residual
  Image dx, djoined; float skip_scale; bool residual;   // residual only; gradients that came by another way
};

// Room of a thread: arrays by channel, blocks of images, and what a block's values are multiplied by.
struct Room {
  const Shape& s; const Drop& drop;
  std::vector<double> sums;
  std::vector<float> vectors, factor, tile, blocks[5];
  std::vector<uint32_t> words;
  Room(const Shape& s_, const Drop& d)
      : s(s_), drop(d), sums(4 * s.c), vectors(8 * s.c), factor(d.seed ? s.rows * s.c : 0), words(factor.size() / 2 + 8) {}
  double* sum(int i) { return sums.data() + i * s.c; }
  float* vector(int i) { return vectors.data() + i * s.c; }
  // The factors of a block, 0 where a value is dropped, or null.
  const float* draw(int64_t n, int64_t row, int64_t count) {
    if (!drop.seed) return nullptr;
    const uint64_t start = (uint64_t((drop.n0 ? *drop.n0 : 0) + n) * uint64_t(s.hw) + uint64_t(row)) * uint64_t(s.c);
    dropout(uint64_t(*drop.seed), drop.layer, start, count * s.c, drop.threshold, drop.inv_keep, words.data(), factor.data());
    return factor.data();
  }
};
// Calls run(sample, room) for every sample.
template <class P, class F> inline void samples(const P& f, const void* threads, const F& run) {
  parallel(threads, f.s.n, f.s.hw * f.s.c, [&](int64_t begin, int64_t end) {
    Room room(f.s, f.drop);
    for (int64_t n = begin; n < end; n++) run(n, room);
  });
}
// Calls f(its first row of all, first row in the sample, how many) for every block of a sample.
template <class F> inline void blocks(const Shape& s, int64_t n, const F& f) {
  for (int64_t row = 0; row < s.hw; row += s.rows) f(n * s.hw + row, row, std::min(s.rows, s.hw - row));
}
// Calls f(source, its first channel) for both sources.
template <class F> inline void each(const Shape& s, const F& f) {
  for (int i = 0; i < 2 && s.parts[i]; i++) f(i, i * s.parts[0]);
}
inline const float* from(const float* values, int64_t first) { return values ? values + first : nullptr; }
// Calls f with constants in place of flags.
template <class F> inline void constants(bool a, bool b, const F& f) {
  const std::true_type yes; const std::false_type no;
  if (a) b ? f(yes, yes) : f(yes, no);
  else b ? f(no, yes) : f(no, no);
}

// Rows of a source and their channels. Pointers below are at its first channel; an array by all channels is `all` long, and so is
// the step from row to row where a tensor has all channels.
struct Rows { int64_t count, own, all; };

// Calls f(width, k) for strips k ... k + width of c channels; the width is a constant of its type.
template <class F> inline void strips(int64_t c, const F& f) {
  int64_t k = 0;
  for (; k + STRIP <= c; k += STRIP) f(std::integral_constant<int, STRIP>(), k);
  for (; k < c; k++) f(std::integral_constant<int, 1>(), k);
}

// sum = (a + bias + skip) * scale
template <bool SKIPS> void add_up(const Rows& r, const float* a, const float* skip, const float* bias, float scale, float* sum) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    for (int64_t i = k; i < k + r.count * r.own; i += r.own) LANES(j, W) sum[i + j] = (a[i + j] + bias[k + j] + (SKIPS ? skip[i + j] : 0.f)) * scale;
  });
}

// The mean of x + v in these rows, about.
inline void first_mean(const Rows& r, const float* x, const float* v, float* pivot) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    float s[W] = {};
    for (int64_t i = k; i < k + r.count * r.own; i += r.own) LANES(j, W) s[j] += x[i + j] + v[k + j];
    LANES(j, W) pivot[k + j] = s[j] / float(r.count);
  });
}

// Adds to sums and squares the differences of x + v from their channel's pivot.
inline void moments(const Rows& r, const float* x, const float* v, const float* pivot, double* sums, double* squares) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    float s[W] = {}, q[W] = {};
    for (int64_t i = k; i < k + r.count * r.own; i += r.own)
      LANES(j, W) {
        const float d = (x[i + j] + v[k + j]) - pivot[k + j];
        s[j] += d;
        q[j] += d * d;
      }
    LANES(j, W) { sums[k + j] += double(s[j]); squares[k + j] += double(q[j]); }
  });
}

// From a sample's moments: mean and rstd of its groups, and m, w and add of z = ((x + v) - m) * w + add.
inline void finish_moments(const Forward& f, int64_t n, double* RESTRICT sums, double* RESTRICT squares, const float* pivot, const float* gain,
                           const float* bias, float* RESTRICT m, float* RESTRICT w, float* RESTRICT add) {
  const Shape& s = f.s;
  const int64_t c = s.c;
  const double rows = double(s.hw), by_rows = 1. / rows, by_channels = 1. / double(s.cg);
  for (int64_t k = 0; k < c; k++) {
    const double from = sums[k] * by_rows;
    squares[k] -= sums[k] * from;   // about the channel's mean
    sums[k] = double(pivot[k]) + from;
  }
  for (int64_t g = 0, k = 0; g < s.groups; g++) {
    double mean = 0., m2 = 0.;
    for (int64_t i = k; i < k + s.cg; i++) mean += sums[i];
    mean *= by_channels;
    for (int64_t i = k; i < k + s.cg; i++) m2 += squares[i] + rows * (sums[i] - mean) * (sums[i] - mean);
    const float rounded = float(mean), rstd = float(1. / std::sqrt(m2 * by_rows * by_channels + f.eps));
    const float rest = float(double(rounded) - mean);   // what rounding takes from a large mean
    f.mean[n * s.groups + g] = rounded;
    f.rstd[n * s.groups + g] = rstd;
    for (const int64_t end = k + s.cg; k < end; k++) { m[k] = rounded; w[k] = rstd; add[k] = rest; }
  }
  for (int64_t k = 0; k < c; k++) {
    w[k] *= gain[k];
    add[k] = bias[k] + add[k] * w[k];
  }
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

// y of z = ((x + v) - m) * w + add; vectors: v, m, w, add.
template <bool ACT, bool DROP> void activate(const Rows& r, const float* x, const float* factor, const float* vectors, float* y) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *w = m + r.all, *add = w + r.all;
    for (int64_t row = 0; row < r.count; row++) {
      const int64_t i = row * r.own + k, whole = row * r.all + k;
      LANES(j, W) {
        const float z = ((x[i + j] + v[j]) - m[j]) * w[j] + add[j], e = ACT ? z * logistic(z) : z;
        y[whole + j] = !DROP ? e : factor[whole + j] != 0.f ? e * factor[whole + j] : 0.f;
      }
    }
  });
}

inline void forward(const Forward& f, int64_t n, Room& room) {
  const Shape& s = f.s;
  double *sums = room.sum(0), *squares = room.sum(1);
  float *v = room.vector(0), *m = room.vector(1), *w = room.vector(2), *add = room.vector(3);
  float *gain = room.vector(4), *bias = room.vector(5), *pivot = room.vector(6), *biases = room.vector(7);
  std::fill(sums, sums + 2 * s.c, 0.);
  f.affine.write(n, s.c, v, gain, bias);
  for (int64_t k = 0; k < s.parts[0]; k++) biases[k] = (f.bias ? f.bias[k] : 0.f) + (f.skip_bias ? f.skip_bias[k] : 0.f);
  blocks(s, n, [&](int64_t at, int64_t row, int64_t count) {
    if (f.a.data) {
      const float *a = f.a.read(at, count, room.blocks[0]), *skip = f.skip.read(at, count, room.blocks[1]);
      float* sum = f.sources[0].place(at, count, room.blocks[2]);
      constants(skip, false, [&](auto skips, auto) { add_up<skips>({count, s.parts[0], s.c}, a, skip, biases, f.skip_scale, sum); });
      f.sources[0].round(at, count, sum);
    }
    each(s, [&](int i, int64_t first) {
      const float* x = f.sources[i].read(at, count, room.blocks[0]);
      if (row == 0) first_mean({count, s.parts[i], s.c}, x, v + first, pivot + first);
      moments({count, s.parts[i], s.c}, x, v + first, pivot + first, sums + first, squares + first);
    });
  });
  finish_moments(f, n, sums, squares, pivot, gain, bias, m, w, add);
  blocks(s, n, [&](int64_t at, int64_t row, int64_t count) {
    const float* factor = room.draw(n, row, count);
    float* y = f.y.place(at, count, room.blocks[1]);
    each(s, [&](int i, int64_t first) {
      const float* x = f.sources[i].read(at, count, room.blocks[0]);
      constants(f.act, factor, [&](auto act, auto drop) { activate<act, drop>({count, s.parts[i], s.c}, x, from(factor, first), v + first, y + first); });
    });
    f.y.round(at, count, y);
  });
}

// From du, the gradient at SiLU's argument: du * weight to tile, to sums those of du, du x_hat and x_hat over the rows. vectors: v,
// m, rstd, gain and bias of z = x_hat * gain + bias, weight.
template <bool ACT, bool DROP>
void differentiate(const Rows& r, const float* x, const float* dy, const float* factor, const float* vectors, float* tile, double* sums) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *rstd = m + r.all, *gain = rstd + r.all, *bias = gain + r.all, *weight = bias + r.all;
    float s0[W] = {}, s1[W] = {}, s2[W] = {};
    for (int64_t row = 0; row < r.count; row++) {
      const int64_t i = row * r.own + k, whole = row * r.all + k;
      LANES(j, W) {
        const float e = ((x[i + j] + v[j]) - m[j]) * rstd[j], z = e * gain[j] + bias[j], s = ACT ? logistic(z) : 1.f;
        const float all = dy[whole + j], d = !DROP ? all : factor[whole + j] != 0.f ? all * factor[whole + j] : 0.f;
        const float du = ACT ? d * (s * (1.f + z * (1.f - s))) : d;
        tile[i + j] = du * weight[j];
        s0[j] += du;
        s1[j] += du * e;
        s2[j] += e;
      }
    }
    double *t0 = sums + k, *t1 = t0 + r.all, *t2 = t1 + r.all;
    LANES(j, W) { t0[j] += double(s0[j]); t1[j] += double(s1[j]); t2[j] += double(s2[j]); }
  });
}

// From a sample's sums of du, du x_hat and x_hat: gradients of what is by channel, the terms of dx, and in s2 its sums.
inline void finish_sums(const Backward& f, int64_t n, double* RESTRICT s0, double* RESTRICT s1, double* RESTRICT s2, const float* rstd, const float* weight,
                        float* RESTRICT c1, float* RESTRICT c2) {
  const Shape& s = f.s;
  const int64_t c = s.c, at = n * c;
  const double rows = double(s.hw), by_count = 1. / double(s.hw * s.cg);
  for (int64_t k = 0; k < c;) {
    const int64_t begin = k, end = k + s.cg;
    double mean = 0., slope = 0., left = 0.;   // over the group, of weight du, weight du x_hat and x_hat
    for (; k < end; k++) {
      mean += double(weight[k]) * s0[k];
      slope += double(weight[k]) * s1[k];
      left += s2[k];
    }
    mean *= by_count; slope *= by_count; left *= by_count;
    slope -= left * mean;   // `left` is 0 but for the rounding of a large mean: x_hat - left has lost nothing to it
    for (k = begin; k < end; k++) {
      s1[k] -= left * s0[k];
      s2[k] = double(weight[k]) * s0[k] - rows * mean - slope * (s2[k] - rows * left);   // the sum of dx
      c1[k] = float(mean - slope * left);
      c2[k] = float(slope * double(rstd[k]));
    }
  }
  const float *gamma = f.affine.gamma, *beta = f.affine.beta, *scale = f.affine.scale ? f.affine.scale + n * f.affine.stride : nullptr;
  float *RESTRICT dgamma = f.rows + at, *RESTRICT dbeta = dgamma + s.n * c;
  for (int64_t k = 0; k < c; k++) {
    const double factor = scale ? double(1.f + scale[k]) : 1.;
    dgamma[k] = float(factor * s1[k]);
    dbeta[k] = float(factor * s0[k]);
  }
  if (f.dscale) for (int64_t k = 0; k < c; k++) f.dscale[at + k] = float(double(gamma[k]) * s1[k] + double(beta[k]) * s0[k]);
  if (f.dshift) for (int64_t k = 0; k < c; k++) f.dshift[at + k] = float(s0[k]);
  if (f.dv) for (int64_t k = 0; k < c; k++) f.dv[at + k] = float(s2[k]);
}

// out = scale * (tile - (c1 + ((x + v) - m) * c2) + more), and to sums those of more = dx + djoined, where these are given.
// vectors: v, m. terms: c1, c2.
template <bool ADDS, bool JOINS>
void finish(const Rows& r, const float* x, const float* tile, const float* dx, const float* djoined, const float* vectors,
            const float* terms, float scale, float* out, double* sums) {
  strips(r.own, [&](auto width, int64_t k) {
    constexpr int W = decltype(width)::value;
    const float *v = vectors + k, *m = v + r.all, *c1 = terms + k, *c2 = c1 + r.all;
    float s[W] = {};
    for (int64_t row = 0; row < r.count; row++) {
      const int64_t i = row * r.own + k, whole = row * r.all + k;
      LANES(j, W) {
        const float more = (ADDS ? dx[i + j] : 0.f) + (JOINS ? djoined[whole + j] : 0.f);
        out[i + j] = scale * (tile[i + j] - (c1[j] + ((x[i + j] + v[j]) - m[j]) * c2[j]) + more);
        if (ADDS || JOINS) s[j] += more;
      }
    }
    LANES(j, W) sums[k + j] += double(s[j]);
  });
}

inline void backward(const Backward& f, int64_t n, Room& room) {
  const Shape& s = f.s;
  double *s0 = room.sum(0), *s1 = room.sum(1), *s2 = room.sum(2), *more = room.sum(3);
  std::fill(s0, s0 + 4 * s.c, 0.);
  float *v = room.vector(0), *m = room.vector(1), *rstd = room.vector(2), *gain = room.vector(3), *bias = room.vector(4);
  float *weight = room.vector(5), *c1 = room.vector(6), *c2 = room.vector(7);
  f.affine.write(n, s.c, v, gain, bias);
  for (int64_t g = n * s.groups, k = 0; k < s.c; g++)
    for (const int64_t end = k + s.cg; k < end; k++) { m[k] = f.mean[g]; rstd[k] = f.rstd[g]; }
  for (int64_t k = 0; k < s.c; k++) weight[k] = gain[k] * rstd[k];
  // What the first pass finds is kept in fp32 for the second, in the place of the result where that is fp32.
  if (f.grads[0].dtype != F32 || f.grads[1].dtype != F32) room.tile.resize(s.hw * s.c);
  const auto tile = [&](int i, int64_t at, int64_t row, int64_t count) {
    return f.grads[i].dtype == F32 ? f.grads[i].place(at, count, room.tile) : room.tile.data() + i * s.hw * s.parts[0] + row * s.parts[i];
  };
  blocks(s, n, [&](int64_t at, int64_t row, int64_t count) {
    const float *factor = room.draw(n, row, count), *dy = f.dy.read(at, count, room.blocks[1]);
    each(s, [&](int i, int64_t first) {
      const float* x = f.sources[i].read(at, count, room.blocks[0]);
      constants(f.act, factor, [&](auto act, auto drop) {
        differentiate<act, drop>({count, s.parts[i], s.c}, x, dy + first, from(factor, first), v + first, tile(i, at, row, count), s0 + first);
      });
    });
  });
  finish_sums(f, n, s0, s1, s2, rstd, weight, c1, c2);
  blocks(s, n, [&](int64_t at, int64_t row, int64_t count) {
    const float *dx = f.dx.read(at, count, room.blocks[1]), *djoined = f.djoined.read(at, count, room.blocks[2]);
    each(s, [&](int i, int64_t first) {
      const float* x = f.sources[i].read(at, count, room.blocks[0]);
      float* out = f.grads[i].place(at, count, room.blocks[3]);
      constants(dx && i == 0, djoined, [&](auto adds, auto joins) {
        finish<adds, joins>({count, s.parts[i], s.c}, x, tile(i, at, row, count), dx, from(djoined, first), v + first, c1 + first, i == 0 ? f.skip_scale : 1.f, out, more + first);
      });
      f.grads[i].round(at, count, out);
    });
  });
  for (int64_t k = 0; f.residual && k < s.c; k++)
    f.rows[(2 * s.n + n) * s.c + k] = k < s.parts[0] ? float(double(f.skip_scale) * (more[k] + s2[k])) : 0.f;
}

}  // namespace gn
