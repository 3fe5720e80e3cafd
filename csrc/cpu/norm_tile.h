// The five loops under every norm, over a matrix x [rows, width] whose columns each have constants of
// their own. Both of torch's layouts are such a matrix: a row is a run of pixels of one channel, or of
// pixels with all their channels.
#pragma once
#include "simd.h"

namespace convoxel {
namespace {

constexpr int kStrip = kVectorBytes == 64 ? 4 : 2;  // vectors: five constants and two sums each stay in registers

// Calls f(V, j, n) for strips of V vectors at column j; n lanes count in the narrow strips at the end.
template <class A, class F>
inline void strips(int64_t width, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t j = 0;
  for (; j + kStrip * L <= width; j += kStrip * L) f(std::integral_constant<int, kStrip>(), j, L);
  for (; j < width; j += L) f(std::integral_constant<int, 1>(), j, int(min<int64_t>(L, width - j)));
}

template <int V, class S>
inline auto part(const S* p, int n) {
  if constexpr (V > 1) return load(p);
  else return n == kLanes<Compute<S>> ? load(p) : load(p, n);
}
template <int V, class S>
inline void put(S* p, Vec<Compute<S>> v, int n, bool past = false) {
  if (past) stream(p, v);
  else if (V > 1 || n == kLanes<Compute<S>>) store(p, v);
  else store(p, v, n);
}
template <int V, class S>
inline void parts(const S* p, int n, Vec<Compute<S>>* v) {
  for (int i = 0; i < V; ++i) v[i] = part<V>(p + i * kLanes<Compute<S>>, n);
}

template <int V, class A>
inline void add(const Vec<A>* v, int n, double* total) {
  constexpr int L = kLanes<A>;
  for (int i = 0; i < V; ++i, total += L) {
    A lanes[L];
    store(lanes, v[i]);
    if (V > 1 || n == L)
      for (int l = 0; l < L; ++l) total[l] += lanes[l];
    else
      for (int l = 0; l < n; ++l) total[l] += lanes[l];
  }
}

// Column sums of d = x * scale - shift and of d * d.
template <class S, class A>
void add_deviations(const S* x, int64_t rows, int64_t width, A scale, const A* shift, double* sum, double* squares) {
  constexpr int L = kLanes<A>;
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> k = broadcast(scale), m[V()], s[V()] = {}, q[V()] = {};
    parts<V()>(shift + j, n, m);
    const S* p = x + j;
    for (int64_t r = 0; r < rows; ++r, p += width)
      for (int v = 0; v < V(); ++v) {
        Vec<A> d = part<V()>(p + v * L, n) * k - m[v];
        s[v] += d;
        q[v] += d * d;
      }
    add<V(), A>(s, n, sum + j);
    add<V(), A>(q, n, squares + j);
  });
}

// y = (x - m) * a + b; large: past the caches
template <class S, class A>
void apply(const S* x, S* y, int64_t rows, int64_t width, bool large, const A* m_, const A* a_, const A* b_) {
  constexpr int L = kLanes<A>;
  const bool past = large && width % L == 0 && streamable(y);
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], a[V()], b[V()];
    parts<V()>(m_ + j, n, m), parts<V()>(a_ + j, n, a), parts<V()>(b_ + j, n, b);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < V(); ++v) {
        int64_t at = r * width + j + v * L;
        put<V()>(y + at, (part<V()>(x + at, n) - m[v]) * a[v] + b[v], n, past);
      }
  });
}

// Column sums of dy and of dy * (x - m) * k
template <class S, class A>
void add_products(const S* dy, const S* x, int64_t rows, int64_t width, const A* m_, const A* k_, double* sum,
                  double* products) {
  constexpr int L = kLanes<A>;
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], k[V()], s[V()] = {}, q[V()] = {};
    parts<V()>(m_ + j, n, m), parts<V()>(k_ + j, n, k);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < V(); ++v) {
        int64_t at = r * width + j + v * L;
        Vec<A> g = part<V()>(dy + at, n), h = (part<V()>(x + at, n) - m[v]) * k[v];
        s[v] += g;
        q[v] += g * h;
      }
    add<V(), A>(s, n, sum + j);
    add<V(), A>(q, n, products + j);
  });
}

// dx = dy * a + (x - m) * k * b + c; large: past the caches
template <class S, class A>
void apply_grad(const S* dy, const S* x, S* dx, int64_t rows, int64_t width, bool large, const A* m_, const A* k_,
                const A* a_, const A* b_, const A* c_) {
  constexpr int L = kLanes<A>;
  const bool past = large && width % L == 0 && streamable(dx);
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], k[V()], a[V()], b[V()], c[V()];
    parts<V()>(m_ + j, n, m), parts<V()>(k_ + j, n, k), parts<V()>(a_ + j, n, a);
    parts<V()>(b_ + j, n, b), parts<V()>(c_ + j, n, c);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < V(); ++v) {
        int64_t at = r * width + j + v * L;
        Vec<A> h = (part<V()>(x + at, n) - m[v]) * k[v];
        put<V()>(dx + at, part<V()>(dy + at, n) * a[v] + (h * b[v] + c[v]), n, past);
      }
  });
}

}  // namespace
}  // namespace convoxel
