// Depthwise correlation with vectors of channels, for channels-last tensors, which are read where they lie.
//
// A tile of positions along W stays in registers while all taps go by; taps beyond the border are left out, along D
// and H from the list of rows, along W in tiles of their own. Blocks are columns along D, so that the second-level
// cache holds the planes that outputs share.
#pragma once
#include "depthwise.h"

namespace convoxel {
namespace {

constexpr int kPositions = kVectorBytes == 64 ? 12 : 8;  // of a tile; with the taps and one operand in registers

enum Border {
  kInside,
  kBorder,
  kTail
};  // what a tile meets: nothing, taps outside along W, the tensor's last channels

template <class S>
struct Row {
  typedef Compute<S> A;
  const TapRow<S>* rows;
  int64_t n, taps;           // rows; taps along W
  const A* w;                // [tap, channels]
  int64_t x_pos, x_tap;      // steps in elements: of positions, of taps
  int64_t w_tap, w_row;      // of the weights: of taps along W, of numbers in rows
  int64_t at, pos, tap, in;  // along W: source of the first position's first tap, the same steps, the extent
  int64_t x_shift;           // of `at`, in elements
  int lanes;                 // channels in use
  const A* bias;
  S* y;
  int64_t y_pos;
  bool stream;  // y past the caches
};

template <class S, Border border>
inline Vec<Compute<S>> read(const Row<S>& g, const S* p) {
  if constexpr (border == kTail) return load(p, g.lanes);
  else return load(p);
}

template <Border border, class S>
inline bool inside(const Row<S>& g, int64_t source) {
  return border == kInside || (source >= 0 && source < g.in);
}

// R positions, TAPS along W (0: g.taps, any steps); positions and taps that step alike share what they read.
template <class S, int R, int TAPS, Border border>
__attribute__((noinline)) void correlate_positions(const Row<S>& g, int64_t first) {
  typedef Compute<S> A;
  Vec<A> acc[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = load(g.bias);
  int64_t shift = g.x_shift + first * g.x_pos, at = g.at + first * g.pos;
  int low = 0, high = R + TAPS;  // places of a shared row that lie inside
  if (border != kInside) {
    low = at < 0 ? int(min<int64_t>(high, ceil_div(-at, g.pos))) : 0;
    high = at < g.in ? int(min<int64_t>(high, ceil_div(g.in - at, g.pos))) : 0;
  }
  for (const TapRow<S>* row = g.rows; row < g.rows + g.n; ++row) {
    const S* x = row->x + shift;
    const A* w = g.w + row->w * g.w_row;
    if constexpr (TAPS > 0) {
      Vec<A> taps[TAPS > 0 ? TAPS : 1];
#pragma GCC unroll 16
      for (int t = 0; t < TAPS; ++t) taps[t] = load(w + t * g.w_tap);
#pragma GCC unroll 32
      for (int j = 0; j < R + TAPS - 1; ++j, x += g.x_pos) {
        if (border != kInside && (j < low || j >= high)) continue;
        Vec<A> v = read<S, border>(g, x);
        in_register<A>(v);
#pragma GCC unroll 16
        for (int t = 0; t < TAPS; ++t)
          if (j - t >= 0 && j - t < R) acc[j - t < 0 || j - t >= R ? 0 : j - t] += v * taps[t];
      }
    } else {
      for (int64_t t = 0; t < g.taps; ++t) {
        const S* p = x + t * g.x_tap;
        Vec<A> tap = load(w + t * g.w_tap);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r, p += g.x_pos)
          if (inside<border>(g, at + r * g.pos + t * g.tap)) acc[r] += read<S, border>(g, p) * tap;
      }
    }
  }
  S* y = g.y + first * g.y_pos;
  if (g.stream) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, y += g.y_pos) stream(y, acc[r]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, y += g.y_pos) {
    if (g.lanes == kLanes<A>) store(y, acc[r]);
    else store(y, acc[r], g.lanes);
  }
}

template <class S, int R, int TAPS>
inline void correlate_tile(const Row<S>& g, int64_t first, const S* end) {
  int64_t at = g.at + first * g.pos, reach = (R - 1) * g.pos + (g.taps - 1) * g.tap;
  const S* highest = g.n ? g.rows[g.n - 1].x + g.x_shift + (first + R - 1) * g.x_pos + (g.taps - 1) * g.x_tap : nullptr;
  if (g.n && highest + kLanes<Compute<S>> > end) correlate_positions<S, R, TAPS, kTail>(g, first);
  else if (at < 0 || at + reach >= g.in) correlate_positions<S, R, TAPS, kBorder>(g, first);
  else correlate_positions<S, R, TAPS, kInside>(g, first);
}

// Tiles of R positions; the last one begins earlier where R does not divide them.
template <class S, int R, int TAPS>
void correlate_tiles(const Row<S>& g, int64_t positions, const S* end) {
  for (int64_t i = 0; i < positions; i += R) correlate_tile<S, R, TAPS>(g, min(i, positions - R), end);
}

template <class S, int TAPS>
void correlate_row(const Row<S>& g, int64_t positions, const S* end) {
  constexpr int R = kPositions;
  if (positions >= 2 * R || positions == R) correlate_tiles<S, R, TAPS>(g, positions, end);
  else if (positions >= R / 2) correlate_tiles<S, R / 2, TAPS>(g, positions, end);
  else correlate_tiles<S, 1, TAPS>(g, positions, end);
}

struct ChannelPlan {
  bool transposed;
  int64_t C, taps, stride;  // stride: of weights, C rounded up to whole vectors
  Axis axis[kAxes];
  Blocks blocks;
};

template <class S>
ChannelPlan make_channel_plan(const ConvGeometry& g, bool transposed) {
  ChannelPlan p{};
  p.transposed = transposed, p.C = g.C, p.taps = 1;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], transposed), p.taps *= g.axis[a].kernel;
  p.stride = round_up(g.C, kLanes<Compute<S>>);
  p.blocks = make_blocks<S>(g.N, g.C, p.axis);
  return p;
}

// What the rows of a block share in one phase along W; how many positions that is. A Row is never copied: wide loads
// of what was just stored wait for all stores before, those of the output too.
template <class S>
int64_t start_phase(const ChannelPlan& p, const Block& b, const Phase& f, Row<S>& g) {
  const Axis& a = p.axis[kW];
  g.taps = f.taps;
  g.x_pos = a.in_step * p.C, g.x_tap = a.in_tap * p.C, g.w_tap = a.w_tap * p.stride, g.w_row = p.stride;
  g.at = b.begin[kW] * a.in_step + f.start, g.pos = a.in_step, g.tap = a.in_tap, g.in = a.in;
  g.y_pos = a.phases * p.C;
  return min(b.end[kW], ceil_div(a.out - f.first, a.phases)) - b.begin[kW];
}

// One row of one phase, all channels of the block, to y.
template <class S>
void correlate_phase(const ChannelPlan& p, const Block& b, Row<S>& g, int64_t positions, const Compute<S>* w,
                     const Compute<S>* bias, S* y, const S* end, bool streams) {
  constexpr int64_t L = kLanes<Compute<S>>;
  bool share = g.pos == g.tap;
  for (int64_t c = b.c; c < b.c + b.channels; c += L) {
    g.x_shift = g.at * p.C + c, g.lanes = int(min<int64_t>(L, b.c + b.channels - c));
    g.w = w + c, g.bias = bias + c, g.y = y + c;
    g.stream = streams && g.lanes == L && streamable(g.y);
    if (share && g.taps == 3) correlate_row<S, 3>(g, positions, end);
    else if (share && g.taps == 5) correlate_row<S, 5>(g, positions, end);
    else correlate_row<S, 0>(g, positions, end);
  }
}

// x and y channels-last, of as many channels.
template <class S>
void correlate_channels(const ChannelPlan& p, const View<S>& x, const S* x_end, const S* w, const S* b,
                        const View<S>& y, char* scratch, int threads) {
  typedef Compute<S> A;
  A* panel = take<A>(scratch, p.taps * p.stride);
  A* bias = take<A>(scratch, p.stride);
  if (p.stride > p.C) zero(panel, p.taps * p.stride);
  if (p.transposed) transpose(w, p.taps, panel + (p.taps - 1) * p.stride, -p.stride, p.C, p.taps);
  else transpose(w, p.taps, panel, p.stride, p.C, p.taps);
  zero(bias, p.stride);
  if (b) convert(b, bias, p.C);
  int64_t most = p.axis[kD].kernel * p.axis[kH].kernel, per_thread = aligned(most * sizeof(TapRow<S>));
  int64_t chunk = row_chunk<S>(p.axis, p.blocks.width, kPositions);
  bool streams = p.blocks.N * y.n * int64_t(sizeof(S)) >= kStreamBytes && p.C % kLanes<A> == 0;
  parallel_for(threads, p.blocks.tiles * p.blocks.c_blocks, [&](int64_t item, int thread) {
    TapRow<S>* rows = reinterpret_cast<TapRow<S>*>(scratch + thread * per_thread);
    Block k = block(p.blocks, p.axis, item / p.blocks.c_blocks, item % p.blocks.c_blocks);
    Row<S> g{};
    g.rows = rows;
    for (int64_t d = k.begin[kD]; d < k.end[kD]; ++d) {
      Reach in_d = reach(p.axis[kD], d);
      S* plane = y.data + k.n * y.n + d * y.axis[kD];
      for (Block b = k; b.begin[kW] < k.end[kW]; b.begin[kW] = b.end[kW]) {
        b.end[kW] = chunk_end(b.begin[kW], k.end[kW], chunk);
        for (int64_t r = 0; r < p.axis[kW].phases; ++r) {
          Phase f = phase(p.axis[kW], r);
          int64_t positions = start_phase(p, b, f, g);
          S* to = plane + (f.first + b.begin[kW] * p.axis[kW].phases) * p.C;
          for (int64_t h = k.begin[kH]; h < k.end[kH] && positions > 0; ++h) {
            g.n = f.taps ? tap_rows(p.axis, in_d, reach(p.axis[kH], h), x.data + k.n * x.n, x.axis, rows) : 0;
            correlate_phase<S>(p, b, g, positions, panel + f.w_first * p.stride, bias, to + h * y.axis[kH], x_end,
                               streams);
          }
        }
      }
    }
    if (streams) end_streams();
  });
}

template <class S>
int64_t channel_bytes(const ChannelPlan& p, int threads) {
  typedef Compute<S> A;
  int64_t rows = aligned(p.axis[kD].kernel * p.axis[kH].kernel * sizeof(TapRow<S>));
  return aligned(p.taps * p.stride * sizeof(A)) + aligned(p.stride * sizeof(A)) + rows * threads;
}

}  // namespace
}  // namespace convoxel
