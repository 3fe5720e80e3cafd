// The three steps of a norm over x [N, C, P], shared by norm.cpp and norm_act.cpp: sums of every channel in every
// segment; a few of them combined, in a fixed order and in double; one pass that applies. Where all that shares a mean
// fits the cache, the steps follow each other there: same sums, same bits. A mean is kept as its nearest float and the
// rest, which goes into the constant term: data of mean 1e4 and deviation 1 loses nothing.
#pragma once
#include "norm_plan.h"

namespace convoxel {
namespace {

constexpr int64_t kCacheBytes = 1024 * 1024;  // half an L2 of today

// Which mean a channel of an image has, and what is whole: a unit has `planes` planes and `means` means of its own.
struct Groups {
  int64_t N, C, G, P;
  bool over_batch, last;
  int64_t units, planes, means;
};

inline Groups make_groups(const NormCall& call) {
  Groups g{call.N, call.C, call.groups, call.P, call.over_batch && call.N > 1, call.last, 1, 1, 1};
  if (g.over_batch && g.last) g.P *= g.N, g.N = 1, g.over_batch = false;
  if (g.over_batch) g.planes = g.N * g.C, g.means = g.G;
  else if (g.last) g.units = g.N, g.means = g.G;
  else g.units = g.N * g.G, g.planes = g.C / g.G;
  return g;
}
template <class S>
Plan make_plan(const Groups& g) {
  return g.last ? make_plan<S>(g.N, g.P, g.C) : make_plan<S>(g.N * g.C, g.P, 1);
}
inline int64_t means(const Groups& g) { return g.units * g.means; }
inline int64_t mean_of(const Groups& g, int64_t n, int64_t c) { return (g.over_batch ? 0 : n) * g.G + c / (g.C / g.G); }

// Calls f(n, c, e) for the channels e of a plane.
template <class F>
inline void each_channel(const Groups& g, int64_t plane, const F& f) {
  if (!g.last) f(plane / g.C, plane % g.C, 0);
  else
    for (int64_t c = 0; c < g.C; ++c) f(plane, c, c);
}

// Calls f(n, c, plane, e) for all that share mean s.
template <class F>
inline void each_member(const Groups& g, int64_t s, const F& f) {
  int64_t n = g.over_batch ? 0 : s / g.G, end = g.over_batch ? g.N : n + 1, share = g.C / g.G;
  for (; n < end; ++n)
    for (int64_t c = s % g.G * share; c < (s % g.G + 1) * share; ++c) f(n, c, g.last ? n : n * g.C + c, g.last ? c : 0);
}

inline double rstd(const NormCall& call, int64_t s) { return 1 / __builtin_sqrt(call.var[s] + call.eps); }

// A mean as the nearest value of the compute type, and what is left.
template <class A>
struct Split {
  A high;
  double low;
};
template <class A>
inline Split<A> split(double mean) {
  A high = A(mean);
  return {high, finite(mean) ? mean - double(high) : 0};
}

// Parallel loop over small things.
template <class F>
void each(int threads, int64_t n, const F& f) {
  constexpr int64_t share = 256;
  parallel_for(threads, ceil_div(n, share), [&](int64_t item, int) {
    for (int64_t i = item * share; i < min(n, (item + 1) * share); ++i) f(i);
  });
}

// The steps: first(plane, segment, thread), combine(mean), last(plane, segment, thread). Over all of x the last goes
// backwards, to what the first has left in the cache.
template <class F, class C, class L>
void in_steps(const Groups& g, const Plan& p, int64_t unit_bytes, int threads, const F& first, const C& combine,
              const L& last) {
  if (unit_bytes > kCacheBytes || g.units < threads) {
    each_segment(p, threads, false, first);
    each(threads, means(g), combine);
    each_segment(p, threads, true, last);
    return;
  }
  int64_t share = max<int64_t>(1, kSegmentBytes / unit_bytes);
  parallel_for(threads, ceil_div(g.units, share), [&](int64_t item, int thread) {
    for (int64_t u = item * share; u < min(g.units, (item + 1) * share); ++u) {
      int64_t begin = u * g.planes, end = begin + g.planes;
      for (int64_t plane = begin; plane < end; ++plane)
        for (int64_t i = 0; i < p.segments; ++i) first(plane, i, thread);
      for (int64_t s = u * g.means; s < (u + 1) * g.means; ++s) combine(s);
      for (int64_t plane = begin; plane < end; ++plane)
        for (int64_t i = 0; i < p.segments; ++i) last(plane, i, thread);
    }
  });
}

template <class S>
struct Pass {
  typedef Compute<S> A;
  const NormCall& call;
  const Groups g;
  const Plan p;
  const S *x, *dy;
  S *y, *dx;
  const bool large;  // what is written goes past the caches
  const A *w, *b;
  double *one, *two;         // sums of a channel in a segment: [planes, segments, channels]
  double *sum_g, *sum_gh;    // of dy and dy h: [N, C]
  double *mean_g, *mean_gh;  // of each mean
  char* columns_;

  explicit Pass(const NormCall& c)
      : call(c), g(make_groups(c)), p(make_plan<S>(g)), large(c.N * c.C * c.P * int64_t(sizeof(S)) >= kStreamBytes) {
    x = static_cast<const S*>(c.x), dy = static_cast<const S*>(c.dy);
    y = static_cast<S*>(c.y), dx = static_cast<S*>(c.dx);
    w = static_cast<const A*>(c.w), b = static_cast<const A*>(c.b);
    int64_t parts = p.planes * p.segments * p.channels, channels = g.N * g.C;
    one = static_cast<double*>(c.scratch), two = one + parts;
    sum_g = two + parts, sum_gh = sum_g + channels;
    mean_g = sum_gh + channels, mean_gh = mean_g + means(g);
    columns_ = reinterpret_cast<char*>(mean_gh + means(g));
  }
  int64_t bytes() const {
    int64_t doubles = 2 * (p.planes * p.segments * p.channels + g.N * g.C + means(g));
    return doubles * int64_t(sizeof(double)) + columns_bytes<A>(p) * call.threads;
  }
  Columns<A> mine(int thread) const { return columns<A>(p, columns_ + thread * columns_bytes<A>(p)); }
  int64_t unit_bytes() const { return g.planes * (g.last ? g.C : 1) * g.P * int64_t(sizeof(S)); }
  double weight(int64_t c) const { return w ? double(w[c]) : 1; }

  void first_moments(int64_t plane, int64_t segment, int thread) const {
    int64_t at = segment_index(p, plane, segment);
    moments(p, x + segment_offset(p, plane, segment), segment_pixels(p, segment), mine(thread), one + at, two + at);
  }

  // Moments of parts into those of the whole: Chan, Golub and LeVeque, 1979.
  void combine_moments(int64_t s) const {
    double count = 0, sum = 0, m2 = 0;
    each_member(g, s, [&](int64_t, int64_t, int64_t plane, int64_t e) {
      for (int64_t i = 0; i < p.segments; ++i) {
        int64_t at = segment_index(p, plane, i) + e;
        double n = double(segment_pixels(p, i)), d = count > 0 ? one[at] - sum / count : 0;
        m2 += two[at] + d * d * (count * n / (count + n));
        count += n, sum += one[at] * n;
      }
    });
    call.mean[s] = sum / count, call.var[s] = m2 / count;
  }

  // Calls f(offset, rows, width) for the blocks of a segment.
  template <class F>
  void blocks(int64_t plane, int64_t segment, const F& f) const {
    int64_t begin = segment_offset(p, plane, segment);
    each_block(p, segment_pixels(p, segment),
               [&](int64_t at, int64_t rows, int64_t width) { f(begin + at, rows, width); });
    if (large) end_streams();
  }

  void write_y(int64_t plane, int64_t segment, int thread) const {
    Columns<A> k = mine(thread);
    each_channel(g, plane, [&](int64_t n, int64_t c, int64_t e) {
      int64_t s = mean_of(g, n, c);
      double a = rstd(call, s) * weight(c);
      Split<A> m = split<A>(call.mean[s]);
      k.constant[0][e] = m.high, k.constant[1][e] = A(a);
      k.constant[2][e] = A((b ? double(b[c]) : 0) - m.low * a);
    });
    for (int i = 0; i < 3; ++i) expand(p, k.constant[i]);
    blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      apply(x + at, y + at, rows, width, large, k.constant[0], k.constant[1], k.constant[2]);
    });
  }

  void first_sums(int64_t plane, int64_t segment, int thread) const {
    Columns<A> k = mine(thread);
    each_channel(g, plane, [&](int64_t n, int64_t c, int64_t e) {
      int64_t s = mean_of(g, n, c);
      k.constant[0][e] = split<A>(call.mean[s]).high, k.constant[1][e] = A(rstd(call, s));
    });
    expand(p, k.constant[0]), expand(p, k.constant[1]);
    zero(k.sum, p.width), zero(k.other, p.width);
    blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      add_products(dy + at, x + at, rows, width, k.constant[0], k.constant[1], k.sum, k.other);
    });
    fold(p, k.sum), fold(p, k.other);
    int64_t to = segment_index(p, plane, segment);
    for (int64_t e = 0; e < p.channels; ++e) one[to + e] = k.sum[e], two[to + e] = k.other[e];
  }

  void combine_sums(int64_t s) const {
    double g_ = 0, gh = 0, low = split<A>(call.mean[s]).low * rstd(call, s), count = 0;
    each_member(g, s, [&](int64_t n, int64_t c, int64_t plane, int64_t e) {
      double sum = 0, product = 0;
      for (int64_t i = 0; i < p.segments; ++i) {
        sum += one[segment_index(p, plane, i) + e];
        product += two[segment_index(p, plane, i) + e];
      }
      product -= low * sum;
      sum_g[n * g.C + c] = sum, sum_gh[n * g.C + c] = product;
      g_ += weight(c) * sum, gh += weight(c) * product, count += double(g.P);
    });
    mean_g[s] = g_ / count, mean_gh[s] = gh / count;
  }

  void write_dx(int64_t plane, int64_t segment, int thread) const {
    Columns<A> k = mine(thread);
    A* const* c_ = k.constant;
    each_channel(g, plane, [&](int64_t n, int64_t c, int64_t e) {
      int64_t s = mean_of(g, n, c);
      double r = rstd(call, s), b = -r * mean_gh[s];
      Split<A> m = split<A>(call.mean[s]);
      c_[0][e] = m.high, c_[1][e] = A(r), c_[2][e] = A(r * weight(c));
      c_[3][e] = A(b), c_[4][e] = A(-r * mean_g[s] - b * m.low * r);
    });
    for (int i = 0; i < 5; ++i) expand(p, c_[i]);
    blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      apply_grad(dy + at, x + at, dx + at, rows, width, large, c_[0], c_[1], c_[2], c_[3], c_[4]);
    });
  }

  // Where mean and variance are fixed: dx = r w dy.
  void write_fixed_dx(int64_t plane, int64_t segment, int thread) const {
    Columns<A> k = mine(thread);
    each_channel(g, plane, [&](int64_t n, int64_t c, int64_t e) {
      k.constant[0][e] = 0, k.constant[1][e] = A(rstd(call, mean_of(g, n, c)) * weight(c));
    });
    expand(p, k.constant[0]), expand(p, k.constant[1]);
    blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      apply(dy + at, dx + at, rows, width, large, k.constant[0], k.constant[1], k.constant[0]);
    });
  }

  void write_dw() const {
    each(call.threads, g.C, [&](int64_t c) {
      double sum = 0, product = 0;
      for (int64_t n = 0; n < g.N; ++n) sum += sum_g[n * g.C + c], product += sum_gh[n * g.C + c];
      static_cast<A*>(call.dw)[c] = A(product), static_cast<A*>(call.db)[c] = A(sum);
    });
  }
};

}  // namespace
}  // namespace convoxel
