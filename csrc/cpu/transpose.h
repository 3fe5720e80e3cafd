// dst[j][i] = src[i][j], with conversion of the storage type: the step between torch's
// contiguous layout (channels far apart) and the channels-last tiles that kernels work on.
#pragma once
#include "simd.h"

namespace convoxel {
namespace {

// In-register transpose of a kLanes x kLanes block: log2(lanes) rounds of two-source shuffles;
// round `s` exchanges the off-diagonal s x s blocks.
template <class A, int s>
inline void transpose_round(Vec<A>* r) {
  constexpr int L = kLanes<A>;
  typedef typename VecOf<typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type>::type Mask;
  Mask low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i & s ? L + i - s : i;
    high[i] = i & s ? L + i : i + s;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & s) continue;
    Vec<A> a = r[i], b = r[i + s];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + s] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * s < L) transpose_round<A, 2 * s>(r);
}

template <class A>
inline void transpose_block(Vec<A>* r) {
  transpose_round<A, 1>(r);
}

// src [rows, columns] with row step src_row, dst [columns, rows] with row step dst_row.
template <class S, class R>
inline void transpose(const S* src, int64_t src_row, R* dst, int64_t dst_row, int64_t rows, int64_t columns) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; i += L) {
    int m = int(min<int64_t>(L, rows - i));
    for (int64_t j = 0; j < columns; j += L) {
      int n = int(min<int64_t>(L, columns - j));
      Vec<A> r[L];
      for (int k = 0; k < L; ++k) {
        const S* p = src + (i + k) * src_row + j;
        r[k] = k >= m ? Vec<A>{} : n == L ? load(p) : load(p, n);
      }
      transpose_block<A>(r);
      for (int k = 0; k < n; ++k) {
        R* p = dst + (j + k) * dst_row + i;
        if (m == L) store(p, r[k]);
        else store(p, r[k], m);
      }
    }
  }
}

}  // namespace
}  // namespace convoxel
