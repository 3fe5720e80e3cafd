// Layer norm, and group norm of one pixel: the mean is over a row of adjacent elements, and w and b
// differ for each of them. A row is read once and stays in the cache.
#pragma once
#include "norm_plan.h"

namespace convoxel {
namespace {

constexpr int64_t kRowsPerItem = 128;  // summed into dw and db in the compute type

inline bool rows_suffice(const NormCall& call) { return call.P == 1 && !call.over_batch && !call.fixed; }

// One row [n] with mean m + low, where l = -low * k, and k = 1 / standard deviation: h = (x - m) * k + l.
template <class A>
struct Row {
  int64_t n;
  A m, k, l;
};

// y = h * w + b
template <class S, class A>
void apply_row(const Row<A>& row, const S* x, const A* w, const A* b, S* y) {
  Vec<A> m = broadcast(row.m), k = broadcast(row.k), l = broadcast(row.l);
  strips<A>(row.n, [&](auto V, int64_t j, int n) {
    for (int v = 0; v < V(); ++v, j += kLanes<A>)
      put<V()>(y + j, ((part<V()>(x + j, n) - m) * k + l) * part<V()>(w + j, n) + part<V()>(b + j, n), n);
  });
}

// Sums of g = dy * w and of g * h; dw += dy * h, db += dy.
template <class S, class A>
void sum_row(const Row<A>& row, const S* dy, const S* x, const A* w, A* dw, A* db, double* sum, double* product) {
  constexpr int L = kLanes<A>;
  Vec<A> m = broadcast(row.m), k = broadcast(row.k), l = broadcast(row.l);
  for (int64_t begin = 0; begin < row.n; begin += kBlockRows * kStrip * L) {
    Vec<A> s[kStrip] = {}, q[kStrip] = {};
    int64_t count = min(row.n - begin, kBlockRows * kStrip * L);
    strips<A>(count, [&](auto V, int64_t j, int n) {
      j += begin;
      for (int v = 0; v < V(); ++v, j += L) {
        Vec<A> d = part<V()>(dy + j, n), h = (part<V()>(x + j, n) - m) * k + l, g = d * part<V()>(w + j, n);
        s[v] += g;
        q[v] += g * h;
        put<V()>(dw + j, part<V()>(dw + j, n) + d * h, n);
        put<V()>(db + j, part<V()>(db + j, n) + d, n);
      }
    });
    for (int v = 0; v < kStrip; ++v)
      for (int i = 0; i < L; ++i) *sum += double(s[v][i]), *product += double(q[v][i]);
  }
}

// dx = g * k + h * b + c
template <class S, class A>
void grad_row(const Row<A>& row, const S* dy, const S* x, const A* w, A b_, A c_, S* dx) {
  Vec<A> m = broadcast(row.m), k = broadcast(row.k), l = broadcast(row.l), b = broadcast(b_), c = broadcast(c_);
  strips<A>(row.n, [&](auto V, int64_t j, int n) {
    for (int v = 0; v < V(); ++v, j += kLanes<A>) {
      Vec<A> g = part<V()>(dy + j, n) * part<V()>(w + j, n), h = (part<V()>(x + j, n) - m) * k + l;
      put<V()>(dx + j, g * k + (h * b + c), n);
    }
  });
}

template <class A>
inline Row<A> make_row(const NormCall& call, int64_t s) {
  double mean = call.mean[s], k = 1 / __builtin_sqrt(call.var[s] + call.eps);
  A high = A(mean);
  return {call.C / call.groups, high, A(k), finite(mean) ? A((double(high) - mean) * k) : 0};
}

struct RowPlan {
  int64_t images, items;  // images of an item
  Plan plan;              // for the moments of a row
};

template <class S>
RowPlan make_row_plan(const NormCall& call) {
  int64_t images = min(kRowsPerItem, max<int64_t>(1, kSegmentBytes / (call.C * int64_t(sizeof(S)))));
  return {images, ceil_div(call.N, images), make_plan<S>(call.N * call.groups, call.C / call.groups, 1)};
}

template <class A>
struct RowScratch {
  char* columns;
  A *w, *b;    // [C]
  A *dw, *db;  // [items, C]
};

template <class A>
RowScratch<A> lay_out(const NormCall& call, const RowPlan& p) {
  RowScratch<A> s;
  s.columns = static_cast<char*>(call.scratch);
  A* a = reinterpret_cast<A*>(s.columns + columns_bytes<A>(p.plan) * call.threads);
  s.w = a, s.b = a + call.C, s.dw = a + 2 * call.C, s.db = s.dw + p.items * call.C;
  for (int64_t c = 0; c < call.C; ++c) s.w[c] = call.w ? static_cast<const A*>(call.w)[c] : A(1);
  for (int64_t c = 0; c < call.C; ++c) s.b[c] = call.b ? static_cast<const A*>(call.b)[c] : A(0);
  return s;
}

// Calls f(s, c, offset) for the rows of an item: mean s, first channel c.
template <class F>
inline void each_row(const NormCall& call, const RowPlan& p, int64_t item, const F& f) {
  for (int64_t n = item * p.images; n < min(call.N, (item + 1) * p.images); ++n)
    for (int64_t g = 0; g < call.groups; ++g) {
      int64_t c = g * (call.C / call.groups);
      f(n * call.groups + g, c, n * call.C + c);
    }
}

template <class S>
void rows_forward(const NormCall& call) {
  typedef Compute<S> A;
  const RowPlan p = make_row_plan<S>(call);
  const RowScratch<A> t = lay_out<A>(call, p);
  const S* x = static_cast<const S*>(call.x);
  S* y = static_cast<S*>(call.y);
  int64_t row = call.C / call.groups;
  parallel_for(call.threads, p.items, [&](int64_t item, int thread) {
    Columns<A> k = columns<A>(p.plan, t.columns + thread * columns_bytes<A>(p.plan));
    each_row(call, p, item, [&](int64_t s, int64_t c, int64_t at) {
      double m2;
      moments(p.plan, x + at, row, k, &call.mean[s], &m2);
      call.var[s] = m2 / double(row);
      apply_row(make_row<A>(call, s), x + at, t.w + c, t.b + c, y + at);
    });
  });
}

template <class S>
void rows_backward(const NormCall& call) {
  typedef Compute<S> A;
  const RowPlan p = make_row_plan<S>(call);
  const RowScratch<A> t = lay_out<A>(call, p);
  const S *x = static_cast<const S*>(call.x), *dy = static_cast<const S*>(call.dy);
  S* dx = static_cast<S*>(call.dx);
  parallel_for(call.threads, p.items, [&](int64_t item, int) {
    A *dw = t.dw + item * call.C, *db = t.db + item * call.C;
    for (int64_t c = 0; c < call.C; ++c) dw[c] = db[c] = 0;
    each_row(call, p, item, [&](int64_t s, int64_t c, int64_t at) {
      Row<A> row = make_row<A>(call, s);
      double sum = 0, product = 0;
      sum_row(row, dy + at, x + at, t.w + c, dw + c, db + c, &sum, &product);
      A b = A(-double(row.k) * product / double(row.n)), d = A(-double(row.k) * sum / double(row.n));
      if (dx) grad_row(row, dy + at, x + at, t.w + c, b, d, dx + at);
    });
  });
  if (!call.dw) return;
  constexpr int64_t share = 256;
  parallel_for(call.threads, ceil_div(call.C, share), [&](int64_t part, int) {
    for (int64_t c = part * share; c < min(call.C, (part + 1) * share); ++c) {
      double dw = 0, db = 0;
      for (int64_t i = 0; i < p.items; ++i) dw += t.dw[i * call.C + c], db += t.db[i * call.C + c];
      static_cast<A*>(call.dw)[c] = A(dw), static_cast<A*>(call.db)[c] = A(db);
    }
  });
}

template <class S>
int64_t rows_scratch(const NormCall& call) {
  typedef Compute<S> A;
  const RowPlan p = make_row_plan<S>(call);
  return columns_bytes<A>(p.plan) * call.threads + (2 + 2 * p.items) * call.C * int64_t(sizeof(A));
}

}  // namespace
}  // namespace convoxel
