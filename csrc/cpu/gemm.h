// The two register tiles under every convolution and linear layer. Both keep rows x V vectors of
// sums in registers; the vector lanes are output channels, the rows are broadcast scalars.
#pragma once
#include "simd.h"

namespace convoxel {
namespace {

// y[row][k] (+)= sum over taps (d, h, w) and channels c of x[row + tap][c] * w[tap][c][k], for the taps
// (d, h) of one pass, numbered d * taps[1] + h.
template <class A>
struct CorrelateTile {
  int64_t taps[3];   // D, H, W; where W taps are adjacent in x and w they are merged into `channels`
  int64_t channels;  // c, contiguous in x
  int64_t x_tap[3];  // step of x per tap
  int64_t w_tap[3];  // step of w per tap; w is [tap, c, V * lanes]
  int64_t x_row;     // step of x from one output pixel to the next
  int64_t y_row;
  int tail;            // lanes in use of the last vector
  int64_t begin, end;  // taps (d, h) of this pass; every pass sums from zero and is then added to y
  bool stream;         // y past the caches: a single pass, no tail
  const A* bias;       // [V * lanes], what the first pass is added to; nullptr: y
};

template <class A, int V>
__attribute__((always_inline)) inline void add_row(const A* base, bool whole, bool past, A* y, int tail,
                                                   const Vec<A>* acc) {
  constexpr int L = kLanes<A>;
  if (past) {
    for (int v = 0; v < V; ++v) stream(y + v * L, load(base + v * L) + acc[v]);
    return;
  }
  for (int v = 0; v < V - 1; ++v) store(y + v * L, load(base + v * L) + acc[v]);
  A* last = y + (V - 1) * L;
  base += (V - 1) * L;
  if (tail == L) store(last, load(base) + acc[V - 1]);
  else store(last, (whole ? load(base) : load(base, tail)) + acc[V - 1], tail);
}

// x and w of one tap, all its channels. Rows are addressed from every third one, so that
// base + {0, 1, 2} * x_row needs six pointers and not one for each row.
template <class A, int T, int V>
inline void accumulate_tap(const A* x, int64_t x_row, const A* w, int64_t channels, Vec<A> (*acc)[V]) {
  constexpr int L = kLanes<A>, P = (T + 2) / 3;
  const A* p[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) p[j] = x + 3 * j * x_row;
  for (int64_t c = 0; c < channels; ++c, w += V * L) {
    Vec<A> b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = load(w + v * L);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      Vec<A> a = broadcast(p[t / 3][(t % 3) * x_row]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[t][v] += a * b[v];
    }
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) ++p[j];
  }
}

// Short passes added up: one chain of a thousand sums would cost 6 eps.
template <class A, int T, int V>
__attribute__((noinline)) void correlate_tile(const CorrelateTile<A>& g, const A* x, const A* w, A* y) {
  Vec<A> acc[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) acc[t][v] = Vec<A>{};
  for (int64_t tap = g.begin; tap < g.end; ++tap) {
    int64_t d = tap / g.taps[1], h = tap % g.taps[1];
    for (int64_t q = 0; q < g.taps[2]; ++q)
      accumulate_tap<A, T, V>(x + d * g.x_tap[0] + h * g.x_tap[1] + q * g.x_tap[2], g.x_row,
                              w + d * g.w_tap[0] + h * g.w_tap[1] + q * g.w_tap[2], g.channels, acc);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    A* row = y + t * g.y_row;
    add_row<A, V>(g.bias ? g.bias : row, g.bias != nullptr, g.stream, row, g.tail, acc[t]);
  }
}

// dw[row][k] += sum over pixels (h, w) of x[pixel][row] * dy[pixel][k]; rows are contiguous in x.
template <class A>
struct OuterTile {
  int64_t pixels[2];  // H, W
  int64_t x_step[2];  // step of x per pixel of each axis
  int64_t dy_step[2];
};

template <class A, int T, int V>
__attribute__((noinline)) void outer_tile(const OuterTile<A>& g, const A* x, const A* dy, A* dw) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) acc[t][v] = Vec<A>{};
  for (int64_t h = 0; h < g.pixels[0]; ++h) {
    const A* xs = x + h * g.x_step[0];
    const A* ds = dy + h * g.dy_step[0];
    for (int64_t i = 0; i < g.pixels[1]; ++i, xs += g.x_step[1], ds += g.dy_step[1]) {
      Vec<A> b[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) b[v] = load(ds + v * L);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        Vec<A> a = broadcast(xs[t]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[t][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) store(dw + (t * V + v) * L, load(dw + (t * V + v) * L) + acc[t][v]);
}

// Calls f with the tile height as a compile-time number, 1 <= rows <= T.
template <int T, class F>
inline void with_rows(int64_t rows, const F& f) {
  if constexpr (T > 1) {
    if (rows < T) return with_rows<T - 1>(rows, f);
  }
  f(std::integral_constant<int, T>{});
}

// The i-th of `parts` nearly equal pieces of [0, n): 128 in 10 gives 12 or 13, never a short rest.
struct Range {
  int64_t begin, end;
};
inline Range piece(int64_t n, int64_t parts, int64_t i) { return {n * i / parts, n * (i + 1) / parts}; }

}  // namespace
}  // namespace convoxel
