// Winograd's minimal filtering for three taps (Lavin and Gray, 2015, arXiv:1509.09308; points as in Toom and Cook):
// M outputs of a correlation from P = M + 2 products,
//
//   y = A' [(G w) . (B' x)],
//
// along every axis that has three taps; an axis of one tap has M = P = 1 and is left alone. The weights' gradient is
// the adjoint of the same: dw = G' [(A dy) . (B' x)]. The rows of B', G and of A belong to the points 0, 1, -1,
// infinity (M = 2) and 0, 1, -1, 2, -1/2, infinity (M = 4): these have half the rounding error of 0, 1, -1, 2, -2,
// infinity.
#pragma once
#include "simd.h"

namespace convoxel {
namespace {

constexpr int points(int M) { return M == 1 ? 1 : M + 2; }

// v = B' x, P to P.
struct InputTransform {
  static constexpr int in(int M) { return points(M); }
  static constexpr int out(int M) { return points(M); }
  template <int M, class V>
  static void apply(const V* x, V* v) {
    if constexpr (M == 2) {
      v[0] = x[2] - x[0], v[1] = x[2] + x[1], v[2] = x[2] - x[1], v[3] = x[3] - x[1];
    } else {
      V p = x[4] - x[2], q = x[3] - x[1];
      v[0] = (x[0] - x[2]) + p - 1.5f * q;
      v[1] = p + q - 1.5f * (x[3] + x[2]);
      v[2] = p - q - 1.5f * (x[3] - x[2]);
      v[3] = p + 0.5f * q;
      v[4] = p - 2.0f * q;
      v[5] = (x[5] - x[3]) - q - 1.5f * p;
    }
  }
};

// u = G w, 3 to P.
struct WeightTransform {
  static constexpr int in(int M) { return M == 1 ? 1 : 3; }
  static constexpr int out(int M) { return points(M); }
  template <int M, class V>
  static void apply(const V* w, V* u) {
    V even = w[0] + w[2];
    if constexpr (M == 2) {
      u[0] = -w[0], u[1] = 0.5f * (even + w[1]), u[2] = 0.5f * (even - w[1]), u[3] = w[2];
    } else {
      u[0] = w[0];
      u[1] = (even + w[1]) * (-1.0f / 3);
      u[2] = (even - w[1]) * (1.0f / 3);
      u[3] = (w[0] + 2.0f * w[1] + 4.0f * w[2]) * (1.0f / 15);
      u[4] = (4.0f * w[0] - 2.0f * w[1] + w[2]) * (-4.0f / 15);
      u[5] = w[2];
    }
  }
};

// y = A' m, P to M.
struct OutputTransform {
  static constexpr int in(int M) { return points(M); }
  static constexpr int out(int M) { return M; }
  template <int M, class V>
  static void apply(const V* m, V* y) {
    V s = m[1] + m[2], d = m[1] - m[2];
    if constexpr (M == 2) {
      y[0] = m[0] + s, y[1] = d + m[3];
    } else {
      y[0] = m[0] + s + (m[3] + m[4]);
      y[1] = d + 2.0f * m[3] - 0.5f * m[4];
      y[2] = s + 4.0f * m[3] + 0.25f * m[4];
      y[3] = d + 8.0f * m[3] - 0.125f * m[4] + m[5];
    }
  }
};

// A dy, M to P.
struct OutputAdjoint {
  static constexpr int in(int M) { return M; }
  static constexpr int out(int M) { return points(M); }
  template <int M, class V>
  static void apply(const V* y, V* m) {
    if constexpr (M == 2) {
      m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = y[1];
    } else {
      V even = y[0] + y[2], odd = y[1] + y[3];
      m[0] = y[0];
      m[1] = even + odd;
      m[2] = even - odd;
      m[3] = y[0] + 2.0f * (y[1] + 2.0f * y[2] + 4.0f * y[3]);
      m[4] = y[0] - 0.5f * (y[1] - 0.5f * y[2] + 0.25f * y[3]);
      m[5] = y[3];
    }
  }
};

// dw = G' u, P to 3.
struct WeightAdjoint {
  static constexpr int in(int M) { return points(M); }
  static constexpr int out(int M) { return M == 1 ? 1 : 3; }
  template <int M, class V>
  static void apply(const V* u, V* w) {
    if constexpr (M == 2) {
      V even = 0.5f * (u[1] + u[2]);
      w[0] = even - u[0], w[1] = 0.5f * (u[1] - u[2]), w[2] = even + u[3];
    } else {
      V even = (u[2] - u[1]) * (1.0f / 3), p = u[3] * (1.0f / 15), q = u[4] * (4.0f / 15);
      w[0] = u[0] + even + p - 4.0f * q;
      w[1] = 2.0f * (p + q) - (u[1] + u[2]) * (1.0f / 3);
      w[2] = u[5] + even + 4.0f * p - q;
    }
  }
};

template <class T, int M, class A>
__attribute__((always_inline)) inline void transform_line(const A* src, int64_t src_step, A* dst, int64_t dst_step) {
  Vec<A> a[T::in(M)], b[T::out(M)];
  for (int i = 0; i < T::in(M); ++i) a[i] = load(src + i * src_step);
  T::template apply<M>(a, b);
  for (int i = 0; i < T::out(M); ++i) store(dst + i * dst_step, b[i]);
}

// One tile of a plane, one vector of channels: step: of a row, of a column; work holds a vector for every point.
template <class T, int M, class A>
__attribute__((noinline)) void transform_plane(const A* src, const int64_t* src_step, A* work, A* dst,
                                               const int64_t* dst_step) {
  constexpr int64_t column = kLanes<A>, row = points(M) * column;
  for (int i = 0; i < T::in(M); ++i) transform_line<T, M>(src + i * src_step[1], src_step[0], work + i * column, row);
  for (int i = 0; i < T::out(M); ++i) transform_line<T, M>(work + i * row, column, dst + i * dst_step[0], dst_step[1]);
}

// Along the third axis: planes of n adjacent elements, `src_step` and `dst_step` apart.
template <class T, int M, class A>
inline void transform_planes(const A* src, int64_t src_step, A* dst, int64_t dst_step, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) transform_line<T, M>(src + i, src_step, dst + i, dst_step);
}

// Calls f with the outputs of a tile as a compile-time number.
template <class F>
inline void with_outputs(int M, const F& f) {
  if (M == 4) f(std::integral_constant<int, 4>{});
  else f(std::integral_constant<int, 2>{});
}

// Points lie an odd number of cache lines apart: the transforms go from point to point, and steps of 4 KiB, or of
// any even number of lines, would fall on few sets of the cache. Measured 1.1 to 1.4 times faster.
template <class A>
inline int64_t point_step(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(A);
  return (ceil_div(elements, line) | 1) * line;
}

}  // namespace
}  // namespace convoxel
