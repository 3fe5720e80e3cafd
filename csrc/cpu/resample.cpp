// Interpolation and its adjoint, as one engine. Both apply a sparse matrix along D, H and W in turn,
//
//   out[m, d, h, w, i] = sum over (j, k, l) of D[d, j] H[h, k] W[w, l] in[m, j, k, l, i],
//
// whose rows are, forward, the one or two source voxels of an output voxel and their weights (torch's
// rules, float32 roundings included), and, backward, the transpose of that: every voxel of the input
// gathers from the outputs that it went to, in rising order, so no sum depends on threads.
//
// Either layout is [images, D, H, W, inner]: contiguous has N C images and inner 1, channels-last has
// N images and inner C. For each output row (d, h): the source rows are blended into one row of the
// compute type, which stays in L1; then W is done on it. There vectors lie along the channels where
// those fill one, and otherwise along the row, gathered from two registers by a shuffle.
#include "conv_tile.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int kMaxTaps = 8;                  // of a row of W, for the shuffles: x4 linear, backward
constexpr int64_t kStripBytes = 256 * 1024;  // a tile's part of one plane; about five of them are live
constexpr int64_t kItemElements = 16 * 1024;

// torch's source index of output voxel o. "vectorized" is what torch's channels-last and small 2-D
// kernels compute, in float32 at any dtype; the others compute in R. The roundings, fused ones too, are
// torch's, because a nearest voxel hangs on the last bit. Written so that NaN ends inside the axis.
template <class R>
inline R torch_scale(const ResampleAxis& a, bool align_corners) {
  if (align_corners) return a.out > 1 ? R(a.in - 1) / R(a.out - 1) : R(0);
  return a.scale > 0 ? R(1 / a.scale) : R(a.in) / R(a.out);
}

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <class R>
inline int64_t floor_within(R position, int64_t size) {
  return position < R(size) ? min(int64_t(position), size - 1) : size - 1;
}

template <class R>
inline R centre(R scale, int64_t o) {
  return max(fused(scale, R(o) + R(0.5), R(-0.5)), R(0));
}

template <class A>
inline int64_t nearest(const ResampleAxis& a, int mode, int64_t o) {
  float at = 0;
  if (mode == kNearest) at = float(torch_scale<A>(a, false) * A(o));
  if (mode == kNearestExact) at = float(double(centre(torch_scale<A>(a, false), o)) + 0.5);
  if (mode == kNearestVectorized && a.in == a.out) return o;
  if (mode == kNearestVectorized && a.out == 2 * a.in) return o / 2;
  if (mode == kNearestVectorized) at = torch_scale<float>(a, false) * float(o);
  if (mode == kNearestExactVectorized) at = float((double(o) + 0.5) * double(torch_scale<float>(a, false)));
  return floor_within(at, a.in);
}

template <class A>
struct Source {
  int taps;
  int64_t index[2];
  A weight[2];
};

template <class A>
Source<A> source(const ResampleAxis& a, int mode, bool align_corners, int64_t o) {
  if (a.in == 1 && a.out == 1) return {1, {0, 0}, {1, 0}};  // an axis that torch does not have
  if (mode != kLinear) return {1, {nearest<A>(a, mode, o), 0}, {1, 0}};
  if (a.in == a.out) return {2, {o, o}, {1, 0}};
  A scale = torch_scale<A>(a, align_corners), at = align_corners ? scale * A(o) : centre(scale, o);
  int64_t i = floor_within(at, a.in);
  A rest = at - A(i), weight = rest > 0 ? min(rest, A(1)) : A(0);
  return {2, {i, i + (i < a.in - 1)}, {1 - weight, weight}};
}

// The sparse matrix of one axis. Weights of zero stay: zero times infinity is NaN, as in torch.
template <class A>
struct Row {
  int64_t count;
  const int64_t* offset;  // source index times the axis' step
  const A* weight;
};

// Whether both are the same one voxel: nearest repeats rows and planes, and copying is faster.
template <class A>
inline bool same(const Row<A>& a, const Row<A>& b) {
  return a.count == 1 && b.count == 1 && a.offset[0] == b.offset[0] && a.weight[0] == b.weight[0];
}

template <class A>
struct Table {
  int64_t rows;
  int64_t* first;  // [rows + 1]
  int64_t* offset;
  A* weight;
  Row<A> row(int64_t i) const { return {first[i + 1] - first[i], offset + first[i], weight + first[i]}; }
};

template <class A>
int64_t table_bytes(const ResampleAxis& a) {
  return aligned((max(a.in, a.out) + 1) * 8) + aligned(2 * a.out * 8) + aligned(2 * a.out * int64_t(sizeof(A)));
}

template <class A>
Table<A> make_table(const ResampleGeometry& g, int axis, bool adjoint, int64_t step, char*& scratch) {
  const ResampleAxis& a = g.axis[axis];
  Table<A> t{adjoint ? a.in : a.out, nullptr, nullptr, nullptr};
  t.first = take<int64_t>(scratch, max(a.in, a.out) + 1);
  t.offset = take<int64_t>(scratch, 2 * a.out);
  t.weight = take<A>(scratch, 2 * a.out);
  zero(t.first, t.rows + 1);
  for (int64_t o = 0; o < a.out; ++o) {
    Source<A> s = source<A>(a, g.mode, g.align_corners, o);
    for (int k = 0; k < s.taps; ++k) ++t.first[adjoint ? s.index[k] : o];
  }
  int64_t end = 0;  // first[] counts; now it tells where rows end, and filling backwards where they begin
  for (int64_t i = 0; i <= t.rows; ++i) t.first[i] = end += i < t.rows ? t.first[i] : 0;
  for (int64_t o = a.out - 1; o >= 0; --o) {
    Source<A> s = source<A>(a, g.mode, g.align_corners, o);
    for (int k = s.taps - 1; k >= 0; --k) {
      int64_t at = --t.first[adjoint ? s.index[k] : o];
      t.offset[at] = (adjoint ? o : s.index[k]) * step;
      t.weight[at] = s.weight[k];
    }
  }
  return t;
}

// dst[i] = sum over the rows p and q of p.weight q.weight src[p.offset + q.offset + i], i < n.
template <int V, class S, class R, class A>
inline void combine_block(const S* src, const Row<A>& p, const Row<A>& q, R* dst, int tail) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[V] = {};
  for (int64_t j = 0; j < p.count; ++j)
    for (int64_t k = 0; k < q.count; ++k) {
      Vec<A> weight = broadcast(p.weight[j] * q.weight[k]);
      const S* from = src + p.offset[j] + q.offset[k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[v] += weight * (tail == L ? load(from + v * L) : load(from + v * L, tail));
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if (tail == L) store(dst + v * L, acc[v]);
    else store(dst + v * L, acc[v], tail);
  }
}

template <class S, class R, class A>
inline void combine(const S* src, const Row<A>& p, const Row<A>& q, R* dst, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) combine_block<4>(src + i, p, q, dst + i, L);
  for (; i + 2 * L <= n; i += 2 * L) combine_block<2>(src + i, p, q, dst + i, L);
  for (; i + L <= n; i += L) combine_block<1>(src + i, p, q, dst + i, L);
  if (i < n) combine_block<1>(src + i, p, q, dst + i, int(n - i));
}

template <class S>
inline void copy(const S* src, S* dst, int64_t n) {
  __builtin_memcpy(dst, src, size_t(n) * sizeof(S));
}

// W along the row: for each vector of the output and each tap, where in the row its lanes come from.
template <class A>
struct Gather {
  static constexpr int L = kLanes<A>;
  typedef typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type Int;
  typedef typename VecOf<Int>::type Lanes;
  int64_t base;
  Int lane[L];  // from base, below 2 L
  Int used[L];  // all bits or none
  A weight[L];
};

template <class A>
struct Gathers {
  int taps;  // 0: the rows do not fit, take the scalar loop
  Gather<A>* at;
};

template <class A>
inline bool along_channels(const ResampleGeometry& g) {
  return g.inner >= kLanes<A>;
}

template <class A>
int64_t gather_count(const ResampleGeometry& g, int64_t rows) {
  return along_channels<A>(g) || kVectorBytes == 16 ? 0 : ceil_div(rows * g.inner, kLanes<A>) * kMaxTaps;
}

// False if the lanes lie further apart than two vectors.
template <class A>
bool fill_gather(const Table<A>& w, int64_t inner, int64_t first, int64_t end, int tap, Gather<A>& g) {
  int64_t position[kLanes<A>], low = INT64_MAX, high = 0;
  for (int l = 0; l < kLanes<A>; ++l) {
    int64_t t = first + l;
    Row<A> row = t < end ? w.row(t / inner) : Row<A>{};
    bool used = tap < row.count;
    position[l] = used ? row.offset[tap] + t % inner : -1;
    g.used[l] = used ? -1 : 0;
    g.weight[l] = used ? row.weight[tap] : A(0);
    if (used) low = min(low, position[l]), high = max(high, position[l]);
  }
  g.base = low == INT64_MAX ? 0 : low;
  for (int l = 0; l < kLanes<A>; ++l) g.lane[l] = g.used[l] ? typename Gather<A>::Int(position[l] - g.base) : 0;
  return high - g.base < 2 * kLanes<A>;
}

template <class A>
Gathers<A> make_gathers(const ResampleGeometry& g, const Table<A>& w, char*& scratch) {
  Gathers<A> t{0, take<Gather<A>>(scratch, gather_count<A>(g, w.rows))};
  if (!gather_count<A>(g, w.rows)) return t;
  int64_t taps = 0, n = w.rows * g.inner;
  for (int64_t i = 0; i < w.rows; ++i) taps = max(taps, w.row(i).count);
  if (taps > kMaxTaps) return t;
  Gather<A>* to = t.at;
  for (int64_t i = 0; i < n; i += kLanes<A>)
    for (int tap = 0; tap < taps; ++tap)
      if (!fill_gather(w, g.inner, i, n, tap, *to++)) return t;
  t.taps = int(taps);
  return t;
}

// `row` is readable two vectors beyond its end.
template <class S, class A>
inline void gather_row(const Gathers<A>& t, const A* row, S* dst, int64_t n) {
  constexpr int L = kLanes<A>;
  typedef typename Gather<A>::Lanes Lanes;
  const Gather<A>* g = t.at;
  for (int64_t i = 0; i < n; i += L) {
    Vec<A> sum{};
    for (int tap = 0; tap < t.taps; ++tap, ++g) {
      Lanes lane, used;
      __builtin_memcpy(&lane, g->lane, sizeof lane);
      __builtin_memcpy(&used, g->used, sizeof used);
      Vec<A> value = __builtin_shuffle(load(row + g->base), load(row + g->base + L), lane);
      sum += (Vec<A>)((Lanes)value & used) * load(g->weight);
    }
    if (i + L <= n) store(dst + i, sum);
    else store(dst + i, sum, int(n - i));
  }
}

template <class S, class A>
inline void scalar_row(const Table<A>& w, const A* row, S* dst, int64_t inner) {
  for (int64_t i = 0; i < w.rows; ++i) {
    Row<A> r = w.row(i);
    for (int64_t c = 0; c < inner; ++c) {
      A sum = 0;
      for (int64_t k = 0; k < r.count; ++k) sum += r.weight[k] * row[r.offset[k] + c];
      from_compute(sum, dst[i * inner + c]);
    }
  }
}

struct Extents {  // of one image
  int64_t axis[kAxes], row, image;
};

inline Extents extents(const ResampleGeometry& g, bool output) {
  Extents e;
  for (int a = 0; a < kAxes; ++a) e.axis[a] = output ? g.axis[a].out : g.axis[a].in;
  e.row = e.axis[kW] * g.inner;
  e.image = e.axis[kD] * e.axis[kH] * e.row;
  return e;
}

// One output row. Along channels, a row that has one source row needs no blending and no copy of it.
template <class S, class A>
inline void resample_row(const S* src, const Row<A>& d, const Row<A>& h, const Table<A>& w, const Gathers<A>& gathers,
                         const Extents& from, A* row, S* dst, int64_t inner) {
  if (inner < kLanes<A>) {
    combine(src, d, h, row, from.row);
    if (gathers.taps) gather_row(gathers, row, dst, w.rows * inner);
    else scalar_row(w, row, dst, inner);
  } else if (d.count * h.count == 1) {
    const A weight = d.weight[0] * h.weight[0];
    const int64_t offset = d.offset[0] + h.offset[0];
    for (int64_t i = 0; i < w.rows; ++i) combine(src, w.row(i), Row<A>{1, &offset, &weight}, dst + i * inner, inner);
  } else {
    const A weight = 1;
    const int64_t offset = 0;
    combine(src, d, h, row, from.row);
    for (int64_t i = 0; i < w.rows; ++i) combine(row, w.row(i), Row<A>{1, &offset, &weight}, dst + i * inner, inner);
  }
}

template <class A>
int64_t row_elements(const ResampleGeometry& g, bool adjoint) {
  return extents(g, adjoint).row + 2 * kLanes<A>;
}

template <class S, bool adjoint>
void resample(const ResampleCall& call) {
  typedef Compute<S> A;
  const ResampleGeometry& g = call.g;
  Extents from = extents(g, adjoint), to = extents(g, !adjoint);
  const S* src = static_cast<const S*>(call.src);
  S* dst = static_cast<S*>(call.dst);
  char* scratch = static_cast<char*>(call.scratch);
  Table<A> d = make_table<A>(g, kD, adjoint, from.axis[kH] * from.row, scratch);
  Table<A> h = make_table<A>(g, kH, adjoint, from.row, scratch);
  Table<A> w = make_table<A>(g, kW, adjoint, g.inner, scratch);
  Gathers<A> gathers = make_gathers(g, w, scratch);
  int64_t row_bytes = aligned(row_elements<A>(g, adjoint) * int64_t(sizeof(A)));

  // An item is some images, or some rows of every plane of one: their sources stay in L2 from plane to plane.
  int64_t strip = max(to.row, ceil_div(from.axis[kH] * from.row, to.axis[kH])) * int64_t(sizeof(S));
  int64_t height = min(to.axis[kH], max<int64_t>(1, kStripBytes / strip));
  int64_t strips = ceil_div(to.axis[kH], height);
  int64_t images = strips > 1 ? 1 : max<int64_t>(1, kItemElements / max(from.image, to.image));
  parallel_for(call.threads, ceil_div(g.images, images) * strips, [&](int64_t item, int thread) {
    A* row = reinterpret_cast<A*>(scratch + thread * row_bytes);
    int64_t m = item / strips * images, begin = item % strips * height;
    int64_t rows = min(height, h.rows - begin);
    for (int64_t end = min(g.images, m + images); m < end; ++m)
      for (int64_t i = 0; i < d.rows; ++i) {
        S* to_row = dst + m * to.image + (i * h.rows + begin) * to.row;
        if (i > 0 && same(d.row(i), d.row(i - 1))) {
          copy(to_row - h.rows * to.row, to_row, rows * to.row);
          continue;
        }
        for (int64_t j = begin; j < begin + rows; ++j, to_row += to.row) {
          if (j > begin && same(h.row(j), h.row(j - 1))) copy(to_row - to.row, to_row, to.row);
          else resample_row(src + m * from.image, d.row(i), h.row(j), w, gathers, from, row, to_row, g.inner);
        }
      }
  });
}

template <class S, bool adjoint>
int64_t resample_scratch(const ResampleGeometry& g, int threads) {
  typedef Compute<S> A;
  int64_t bytes = aligned(gather_count<A>(g, extents(g, !adjoint).axis[kW]) * int64_t(sizeof(Gather<A>)));
  for (const ResampleAxis& a : g.axis) bytes += table_bytes<A>(a);
  return bytes + aligned(row_elements<A>(g, adjoint) * int64_t(sizeof(A))) * threads;
}

template <class S>
constexpr Resample entries() {
  return {resample<S, false>, resample<S, true>, resample_scratch<S, false>, resample_scratch<S, true>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const Resample resample[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
