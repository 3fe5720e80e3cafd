// Winograd's convolution, forward F(x, w) and input gradient G(dy, w) as one correlation, for three taps along H
// and W, three or one along D, stride and dilation 1, in two orders of work.
//
// Regions first, where the transformed weights U stay near or serve many tiles. An item is (image, group, region of
// tiles), and stays in the second-level cache:
//   each plane of the region is packed, its tiles transformed along H and W:  V [h, w point][plane][tile][c];
//   for each block of output channels, for each h, w point, in the first-level cache:
//     V's planes are transformed along D:                                     X [d point][tile][c],
//     multiplied by the weights U [h, w point][d point][c][k]:                Y [d point][tile][k],
//     and transformed back along D:                                           M [h, w point][plane][tile][k];
//   M's tiles are transformed back along H and W, into y.
//
// Weights first, where they are many and the tiles few (deep layers): U, eight times as large as w, would go to
// memory and back. All threads make V of some regions, and of it X [h, w point][d point][tile][c]; then an item is
// (region, block of output channels): for each h point, it goes through the input channels, some at a time, making
// their U [w point][d point][c][k] in the second-level cache.
//
// A plane's transform serves all tiles that overlap there. A bias joins the point 1 of every axis, which each output
// has once. What a tile computes depends neither on the region nor on the thread that it falls to.
#include <type_traits>

#include "conv_moments.h"
#include "conv_weights.h"
#include "gemm.h"
#include "tables.h"
#include "winograd_weights.h"

namespace convoxel {
namespace {

// A region's input in V, and the part of the output that it covers.
template <class S, class A>
struct Work {
  Region r;
  Side<S, A> x;
  Box box;
  int64_t group, tiles, slot;
  A* X;  // weights first: V transformed along D
};

template <class S, class A>
void start(const Plan& p, int64_t item, Work<S, A>& work) {
  int64_t regions = p.regions[kD] * p.regions[kH] * p.regions[kW], rest = item / regions;
  work.slot = item % regions;
  work.r = make_region(p, item);
  work.group = rest % p.groups;
  work.x.n = rest / p.groups, work.x.c0 = work.group * p.C;
  place(p, work.r, true, work.x);
  work.tiles = 1;
  for (int a = 0; a < kAxes; ++a) {
    work.box.begin[a] = work.r.begin[a] * p.M[a];
    work.box.size[a] = min(work.r.n[a] * p.M[a], p.axis[a].count - work.box.begin[a]);
    work.tiles *= work.r.n[a];
  }
}

// Y [tile][k] (+)= X [tile][c] U [c][k]
template <class A, int V>
void multiply(int64_t tiles, const A* X, int64_t x_stride, const A* U, int64_t channels, const A* bias, A* Y) {
  constexpr int R = tile_rows(V);
  constexpr int64_t width = V * kLanes<A>;
  CorrelateTile<A> g{{1, 1, 1}, channels, {}, {}, x_stride, width, kLanes<A>, 0, 1, false, bias};
  int64_t parts = ceil_div(tiles, R);
  for (int64_t i = 0; i < parts; ++i) {
    Range r = piece(tiles, parts, i);
    with_rows<R>(r.end - r.begin,
                 [&](auto T) { correlate_tile<A, T(), V>(g, X + r.begin * x_stride, U, Y + r.begin * width); });
  }
}

// Y of one h, w point, its planes transformed back along D, to M.
template <class S, class A>
void depth_output(const Plan& p, const Work<S, A>& work, int64_t width, const A* Y, A* M) {
  int64_t slice = work.tiles / work.r.n[kD] * width;
  with_outputs(p.M[kD], [&](auto m) {
    for (int64_t d = 0; d < work.r.n[kD]; ++d)
      transform_planes<OutputTransform, m()>(Y + d * slice, work.tiles * width, M + d * m() * slice, slice, slice);
  });
}

template <class A>
struct Scratch {  // of a thread
  A *rows, *X, *Y, *M, *U, *out_tile;
};

// The point 1 of every axis starts from the bias, the others from zero.
template <class A>
struct Bias {
  alignas(64) A values[kTileVectors * kLanes<A>];
  alignas(64) A none[kTileVectors * kLanes<A>];
  int64_t hw, d;
  const A* at(int64_t q, int64_t point) const { return q == hw && point == d ? values : none; }
};

template <class S, class A>
Bias<A> make_bias(const Plan& p, const S* b, int64_t channels) {
  Bias<A> bias{{}, {}, points(p.M[kW]) + 1, p.M[kD] > 1};
  if (b) convert(b, bias.values, channels);
  return bias;
}

// M of a block of output channels, weights U [h, w point][d point][c][k].
template <class S, class A, int V>
void by_regions(const Plan& p, const Work<S, A>& work, const A* U, const Bias<A>& bias, const Scratch<A>& s,
                int64_t m_step) {
  constexpr int64_t width = V * kLanes<A>;
  bool deep = p.M[kD] > 1;
  for (int64_t q = 0; q < p.points_hw; ++q) {
    A* sums = deep ? s.Y : s.M + q * m_step;
    for (int64_t c = 0; c < p.C; c += kChain) {
      const A* from = work.x.data + q * work.x.step + c;
      int64_t channels = min(kChain, p.C - c), stride = deep ? round_up(channels, kLanes<A>) : p.c_stride;
      if (deep)
        transform_depth<InputTransform>(p, work.r.n[kD], work.tiles / work.r.n[kD], from, work.x.slice, p.c_stride,
                                        stride, s.X);
      for (int64_t d = 0; d < p.points_d; ++d)
        multiply<A, V>(work.tiles, deep ? s.X + d * work.tiles * stride : from, stride,
                       U + ((q * p.points_d + d) * p.C + c) * width, channels, c ? nullptr : bias.at(q, d),
                       sums + d * work.tiles * width);
    }
    if (deep) depth_output(p, work, width, s.Y, s.M + q * m_step);
  }
}

// The same from the packed weights [tap][c][k].
template <class S, class A, int V>
void by_weights(const Plan& p, const Work<S, A>& work, const A* panel, const Bias<A>& bias, const Scratch<A>& s,
                int64_t m_step) {
  constexpr int64_t width = V * kLanes<A>, u_step = kChain * width;
  bool deep = p.M[kD] > 1;
  int64_t columns = points(p.M[kW]), point = work.tiles * width;
  for (int64_t h = 0; h < points(p.M[kH]); ++h) {
    A* sums = deep ? s.Y : s.M + h * columns * m_step;
    for (int64_t c = 0; c < p.C; c += kChain) {
      int64_t channels = min(kChain, p.C - c);
      for (int64_t i = 0; i < channels * width; i += kLanes<A>)
        transform_weight_row(p, panel + c * width + i, p.C * width, h, s.U + i, u_step);
      for (int64_t w = 0; w < columns; ++w)
        for (int64_t d = 0; d < p.points_d; ++d) {
          int64_t q = h * columns + w;
          const A* from =
              deep ? work.X + (q * p.points_d + d) * work.tiles * p.c_stride : work.x.data + q * work.x.step;
          multiply<A, V>(work.tiles, from + c, p.c_stride, s.U + (w * p.points_d + d) * u_step, channels,
                         c ? nullptr : bias.at(q, d), sums + (deep ? (w * p.points_d + d) * point : w * m_step));
        }
    }
    for (int64_t w = 0; deep && w < columns; ++w)
      depth_output(p, work, width, s.Y + w * p.points_d * point, s.M + (h * columns + w) * m_step);
  }
}

// A plane's outputs, added to the sums on their way.
template <class S, int M, class A>
__attribute__((noinline)) void transform_and_sum(const A* src, const int64_t* src_step, A* work, A* dst,
                                                 const int64_t* dst_step, int64_t k, BlockSums<S>& sums) {
  constexpr int P = points(M);
  constexpr int64_t column = kLanes<A>, row = P * column;
  Vec<A> m = load(sums.shift + k), s = load(sums.s + k), q = load(sums.q + k);
  for (int i = 0; i < P; ++i)
    transform_line<OutputTransform, M>(src + i * src_step[1], src_step[0], work + i * column, row);
  for (int i = 0; i < M; ++i) {
    Vec<A> a[P], y[M], d[M];
    for (int j = 0; j < P; ++j) a[j] = load(work + i * row + j * column);
    OutputTransform::apply<M>(a, y);
    for (int j = 0; j < M; ++j) store(dst + i * dst_step[0] + j * dst_step[1], y[j]), d[j] = as_stored<S>(y[j]) - m;
    for (int j = 0; j < M; j += 2) s += d[j] + d[j + 1], q += d[j] * d[j] + d[j + 1] * d[j + 1];
  }
  store(sums.s + k, s), store(sums.q + k, q);
}

// M back to the outputs of a block of `channels` output channels; a tile over the edge goes there through `spare`, and
// so does the first of the sums, if there are any.
template <class S, class A>
void transform_output(const Plan& p, const Work<S, A>& at, const A* M, int64_t m_step, int64_t width, int64_t channels,
                      const Target<A>& y, BlockSums<S>* sums) {
  constexpr int L = kLanes<A>;
  alignas(64) A work[36 * L], spare[16 * L];
  int64_t step[2] = {points(p.M[kW]) * m_step, m_step}, spare_step[2] = {p.M[kW] * L, L};
  with_outputs(p.M[kW], [&](auto m) {
    for (int64_t d = 0; d < at.r.n[kD] * p.M[kD]; ++d)
      for (int64_t h = 0; h < at.r.n[kH]; ++h)
        for (int64_t w = 0; w < at.r.n[kW]; ++w, M += width) {
          if (d >= at.box.size[kD]) continue;
          int64_t rows = min<int64_t>(m(), at.box.size[kH] - h * m());
          int64_t columns = min<int64_t>(m(), at.box.size[kW] - w * m());
          A* to = y.data + d * y.axis[kD] + h * m() * y.axis[kH] + w * m() * y.axis[kW];
          for (int64_t k = 0; k < channels; k += L) {
            int lanes = int(min<int64_t>(L, channels - k));
            bool whole = rows == m() && columns == m() && lanes == L;
            if (whole && sums && !sums->empty()) {
              transform_and_sum<S, m()>(M + k, step, work, to + k, y.axis + kH, k, *sums);
              continue;
            }
            if (whole && !sums) {
              transform_plane<OutputTransform, m()>(M + k, step, work, to + k, y.axis + kH);
              continue;
            }
            transform_plane<OutputTransform, m()>(M + k, step, work, spare, spare_step);
            if (sums && sums->empty()) sums->start(k, as_stored<S>(load(spare)));
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t j = 0; j < columns; ++j) {
                Vec<A> v = load(spare + i * spare_step[0] + j * L);
                store(to + k + i * y.axis[kH] + j * y.axis[kW], v, lanes);
                if (sums) sums->add(k, as_stored<S>(v));
              }
          }
          if (sums) sums->passed(rows * columns);
        }
  });
}

// One block of output channels of a region; U: or the packed weights.
template <class S, class A>
void output_block(const Plan& p, const Work<S, A>& work, int64_t kb, const A* U, const S* b, const Joined<S>& y,
                  const Slots& slots, const Scratch<A>& s) {
  constexpr bool same = std::is_same<S, A>::value;
  bool direct = same && y.last();
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  int64_t k = work.group * p.K + kb * blocks.width, width = blocks.padded_width(kb), used = blocks.used(kb);
  int64_t points = p.weights_first ? p.taps : p.points_d * p.points_hw;
  int64_t m_step = point_step<A>(work.tiles * p.M[kD] * width);
  Bias<A> bias = make_bias<S, A>(p, b ? b + k : nullptr, used);
  U += (work.group * blocks.padded() + kb * blocks.width) * p.C * points;
  with_vectors(blocks.vectors(kb), [&](auto v) {
    if (p.weights_first) by_weights<S, A, v()>(p, work, U, bias, s, m_step);
    else by_regions<S, A, v()>(p, work, U, bias, s, m_step);
  });
  int64_t row = work.box.size[kW] * width;
  for_parts(y, k, used, [&](const View<S>& part, int64_t at, int64_t channels, int64_t from) {
    Target<A> target{s.out_tile, {work.box.size[kH] * row, row, width}};
    if constexpr (same) {
      if (direct) target = target_in(part, work.box, work.x.n, at);
    }
    int64_t all = direct ? channels : round_up(channels, kLanes<A>);
    if (slots.data) {
      BlockSums<S> sums;
      transform_output(p, work, s.M + from, m_step, width, all, target, &sums);
      sums.write(slots, work.x.n, work.slot, k + from, channels);
    } else {
      transform_output<S>(p, work, s.M + from, m_step, width, all, target, nullptr);
    }
    if (!direct) flush(target, part, work.box, work.x.n, at, channels);
  });
}

template <class A>
int64_t thread_bytes(const Plan& p) {
  int64_t bytes = 0;
  for (int64_t n :
       {p.rows, p.weights_first ? 0 : p.X, p.Y, p.M_size, p.weights_first ? p.transformed : p.V, p.out_tile})
    bytes += aligned(n * int64_t(sizeof(A)));
  for (int a = 0; a < kAxes; ++a) bytes += aligned(p.index[a] * 8);
  return bytes;
}

template <class A>
int64_t shared_bytes(const Plan& p) {
  int64_t bytes = p.weights_first ? p.batch * (aligned(p.V * sizeof(A)) + aligned(p.X * sizeof(A)))
                                  : aligned(p.transformed * sizeof(A));
  for (int a = 0; a < kAxes; ++a) bytes += p.batch * aligned(p.index[a] * 8);
  return bytes + aligned(p.panel * sizeof(A));
}

template <class A>
Scratch<A> take_scratch(const Plan& p, char*& mine) {
  A* rows = take<A>(mine, p.rows);
  A* X = take<A>(mine, p.weights_first ? 0 : p.X);
  A* Y = take<A>(mine, p.Y);
  A* M = take<A>(mine, p.M_size);
  return {rows, X, Y, M, nullptr, take<A>(mine, p.out_tile)};
}

template <class S, class A>
void regions_first(const Plan& p, const Joined<S>& x, const A* panel, const S* b, const Joined<S>& y,
                   const Slots& slots, char* scratch, int threads) {
  A* U = take<A>(scratch, p.transformed);
  transform_weights(p, panel, U, threads);
  int64_t per_thread = thread_bytes<A>(p);
  parallel_for(threads, p.all, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    Scratch<A> s = take_scratch<A>(p, mine);
    Work<S, A> work{{}, {x, 0, 0, p.C, {}, p.c_stride, 0, 0, take<A>(mine, p.V)}, {}, 0, 0, 0, nullptr};
    for (int a = 0; a < kAxes; ++a) work.x.packed[a].index = take<int64_t>(mine, p.index[a]);
    start(p, item, work);
    alignas(64) A plane[36 * kLanes<A>];
    for (int64_t d = 0; d < work.x.packed[kD].extent; ++d)
      transform_rows<InputTransform>(p, work.r, work.x, d, 0, work.r.n[kH], s.rows, plane);
    for (int64_t kb = 0; kb < ChannelBlocks<A>(p.K, p.block_vectors).count; ++kb)
      output_block(p, work, kb, U, b, y, slots, s);
  });
}

template <class S, class A>
void weights_first(const Plan& p, const Joined<S>& x, const A* panel, const S* b, const Joined<S>& y,
                   const Slots& slots, char* scratch, int threads) {
  Work<S, A> works[kBatch];
  for (int64_t i = 0; i < p.batch; ++i) {
    works[i] = {{}, {x, 0, 0, p.C, {}, p.c_stride, 0, 0, take<A>(scratch, p.V)}, {}, 0, 0, 0, nullptr};
    works[i].X = take<A>(scratch, p.X);
    for (int a = 0; a < kAxes; ++a) works[i].x.packed[a].index = take<int64_t>(scratch, p.index[a]);
  }
  int64_t per_thread = thread_bytes<A>(p), blocks = ChannelBlocks<A>(p.K, p.block_vectors).count;
  for (int64_t first = 0; first < p.all; first += p.batch) {
    int64_t count = min(p.batch, p.all - first), planes = p.index[kD], rows = p.most[kH];
    for (int64_t i = 0; i < count; ++i) start(p, first + i, works[i]);
    parallel_for(threads, count * planes * rows, [&](int64_t item, int thread) {
      const Work<S, A>& work = works[item / (planes * rows)];
      int64_t d = item / rows % planes, h = item % rows;
      if (d >= work.x.packed[kD].extent || h >= work.r.n[kH]) return;
      alignas(64) A plane[36 * kLanes<A>];
      A* packed = reinterpret_cast<A*>(scratch + thread * per_thread);
      transform_rows<InputTransform>(p, work.r, work.x, d, h, 1, packed, plane);
    });
    parallel_for(threads, p.M[kD] > 1 ? count * p.points_hw : 0, [&](int64_t item, int) {
      const Work<S, A>& work = works[item / p.points_hw];
      int64_t q = item % p.points_hw;
      transform_depth<InputTransform>(p, work.r.n[kD], work.tiles / work.r.n[kD], work.x.data + q * work.x.step,
                                      work.x.slice, p.c_stride, p.c_stride,
                                      work.X + q * p.points_d * work.tiles * p.c_stride);
    });
    parallel_for(threads, count * blocks, [&](int64_t item, int thread) {
      char* mine = scratch + thread * per_thread;
      Scratch<A> s = take_scratch<A>(p, mine);
      s.U = take<A>(mine, p.transformed);
      output_block(p, works[item % count], item / count, panel, b, y, slots, s);
    });
  }
}

template <class S, class A>
void correlate(const Plan& p, const Joined<S>& x, const S* w, const S* b, const Joined<S>& y, const Slots& slots,
               char* scratch, int threads) {
  A* panel = take<A>(scratch, p.panel);
  Weights weights{p.transposed, p.groups, p.C, p.K, p.taps, p.C, p.w_last, p.w_float};
  pack_weights(weights, ChannelBlocks<A>(p.K, p.block_vectors), w, panel, threads);
  if (p.weights_first) weights_first(p, x, panel, b, y, slots, scratch, threads);
  else regions_first(p, x, panel, b, y, slots, scratch, threads);
}

template <class A>
int64_t scratch_bytes(const Plan& p, int threads) {
  return shared_bytes<A>(p) + thread_bytes<A>(p) * threads;
}

inline int64_t slot_count(const Plan& p) { return p.regions[kD] * p.regions[kH] * p.regions[kW]; }

template <class S>
int64_t slots(const ConvGeometry& g) {
  return slot_count(make_plan<Compute<S>>(g, false));
}

template <class S>
void forward(const ConvCall& call) {
  Plan p = make_plan<Compute<S>>(call.g, false);
  correlate<S, Compute<S>>(p, join_x<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           join_y<S>(call), {call.moments, slot_count(p), call.g.K}, static_cast<char*>(call.scratch),
                           team(call.g, call.threads));
}

template <class S>
void input_grad(const ConvCall& call) {
  Plan p = make_plan<Compute<S>>(call.g, true);
  correlate<S, Compute<S>>(p, join_y<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           join_x<S>(call), {}, static_cast<char*>(call.scratch), team(call.g, call.threads));
}

template <class S, bool transposed>
int64_t correlate_scratch(const ConvGeometry& g, int threads) {
  return scratch_bytes<Compute<S>>(make_plan<Compute<S>>(g, transposed), threads);
}

template <class S>
constexpr ConvCorrelate entries() {
  return {forward<S>, input_grad<S>, correlate_scratch<S, false>, correlate_scratch<S, true>, slots<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_winograd[kDTypes] = {entries<float>(), entries<bfloat16>(), {}};
}

}  // namespace convoxel
