// Depthwise weight gradient with vectors of channels, for channels-last tensors, which are read where they lie. The
// sums of several rows of taps stay in registers while a row of outputs goes by.
#pragma once
#include "depthwise.h"

namespace convoxel {
namespace {

constexpr int kSums = kVectorBytes == 64 ? 27 : 12;  // in registers
constexpr int64_t kSumPositions = 24;                // least of a piece of a row: sums are added to memory after it
constexpr int64_t kPieces = 2 * kMinItems;

template <class S>
struct Sums {
  typedef Compute<S> A;
  const TapRow<S>* rows;
  int64_t taps;              // along W
  int64_t x_pos, x_tap;      // steps in elements: of outputs, of taps
  int64_t at, pos, tap, in;  // along W: source of the first output's first tap, the same steps, the extent
  int64_t x_shift;           // of `at`, in elements
  const S* dy;
  int64_t dy_pos;
  A* panel;       // [tap, channels]
  int64_t w_tap;  // its step
  int lanes;      // channels in use
};

template <class S>
struct Ends {  // of the tensors: no whole vector is read beyond
  const S *x, *dy;
};

enum Border { kInside, kBorder, kTail };

template <class S, Border border>
inline Vec<Compute<S>> read(const Sums<S>& g, const S* p) {
  if constexpr (border == kTail) return load(p, g.lanes);
  else return load(p);
}

// Adds outputs [begin, end) of a row to the sums of R rows of taps, of taps [first, first + T) along W.
template <class S, int R, int T, Border border>
__attribute__((noinline)) void add_outputs(const Sums<S>& g, int64_t row, int64_t first, int64_t begin, int64_t end) {
  typedef Compute<S> A;
  Vec<A> acc[R][T];
  const S* x[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    x[r] = g.rows[row + r].x + g.x_shift + begin * g.x_pos + first * g.x_tap;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[r][t] = Vec<A>{};
  }
  const S* dy = g.dy + begin * g.dy_pos;
  int64_t x_pos = g.x_pos, x_tap = g.x_tap, dy_pos = g.dy_pos, offset = 0;
  for (int64_t i = begin; i < end; ++i, dy += dy_pos, offset += x_pos) {
    Vec<A> d = read<S, border>(g, dy);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int64_t source = g.at + i * g.pos + (first + t) * g.tap;
      if (border != kInside && (source < 0 || source >= g.in)) continue;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][t] += d * read<S, border>(g, x[r] + offset + t * x_tap);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      A* sum = g.panel + (g.rows[row + r].w + first + t) * g.w_tap;
      store(sum, load(sum) + acc[r][t]);
    }
}

template <class S, int R, int T>
void add_span(const Sums<S>& g, int64_t row, int64_t first, int64_t n, const Ends<S>& end) {
  int64_t at = g.at + first * g.tap, reach = (T - 1) * g.tap;
  int64_t low = at < 0 ? min(n, ceil_div(-at, g.pos)) : 0;
  int64_t high = max(low, at + reach < g.in ? min(n, (g.in - 1 - at - reach) / g.pos + 1) : 0);
  constexpr int L = kLanes<Compute<S>>;
  const S* highest = g.rows[row + R - 1].x + g.x_shift + (n - 1) * g.x_pos + (first + T - 1) * g.x_tap;
  if (highest + L > end.x || g.dy + (n - 1) * g.dy_pos + L > end.dy)
    return add_outputs<S, R, T, kTail>(g, row, first, 0, n);
  if (low > 0) add_outputs<S, R, T, kBorder>(g, row, first, 0, low);
  if (high > low) add_outputs<S, R, T, kInside>(g, row, first, low, high);
  if (n > high) add_outputs<S, R, T, kBorder>(g, row, first, high, n);
}

template <class S, int T>
void add_rows(const Sums<S>& g, int64_t rows, int64_t first, int64_t n, const Ends<S>& end) {
  constexpr int R = kSums / T > 9 ? 9 : kSums / T;
  int64_t r = 0;
  for (; r + R <= rows; r += R) add_span<S, R, T>(g, r, first, n, end);
  if constexpr (R > 3)
    for (; r + 3 <= rows; r += 3) add_span<S, 3, T>(g, r, first, n, end);
  for (; r < rows; ++r) add_span<S, 1, T>(g, r, first, n, end);
}

// One row of n outputs.
template <class S>
void add_row(const Sums<S>& g, int64_t rows, int64_t n, const Ends<S>& end) {
  if (g.taps == 3) return add_rows<S, 3>(g, rows, 0, n, end);
  if (g.taps == 5) return add_rows<S, 5>(g, rows, 0, n, end);
  for (int64_t t = 0; t < g.taps; ++t) add_rows<S, 1>(g, rows, t, n, end);
}

struct ChannelWeightPlan {
  int64_t C, taps, stride, pieces;  // stride: of panels, C rounded up to whole vectors
  Axis axis[kAxes];
  Blocks blocks;
};

template <class S>
ChannelWeightPlan make_channel_weight_plan(const ConvGeometry& g) {
  ChannelWeightPlan p{};
  p.C = g.C, p.taps = 1;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], false), p.taps *= g.axis[a].kernel;
  p.stride = round_up(g.C, kLanes<Compute<S>>);
  p.blocks = make_blocks<S>(g.N, g.C, p.axis);
  p.pieces = min(p.blocks.tiles, ceil_div(kPieces, p.blocks.c_blocks));
  return p;
}

inline int64_t row_bytes(const ChannelWeightPlan& p) { return aligned(p.axis[kD].kernel * p.axis[kH].kernel * 16); }

template <class S>
void add_block(const ChannelWeightPlan& p, const Block& block, const View<S>& x, const View<S>& y, const Ends<S>& end,
               TapRow<S>* rows, Compute<S>* panel) {
  typedef Compute<S> A;
  const Axis& a = p.axis[kW];
  Phase f = forward_phase(a.conv);
  int64_t chunk = row_chunk<S>(p.axis, p.blocks.width, kSumPositions);
  for (int64_t d = block.begin[kD]; d < block.end[kD]; ++d) {
    Reach in_d = reach(p.axis[kD], d);
    for (Block b = block; b.begin[kW] < block.end[kW]; b.begin[kW] = b.end[kW])
      for (int64_t h = b.begin[kH]; h < b.end[kH]; ++h) {
        b.end[kW] = chunk_end(b.begin[kW], block.end[kW], chunk);
        int64_t n = tap_rows(p.axis, in_d, reach(p.axis[kH], h), x.data + b.n * x.n, x.axis, rows);
        const S* dy = y.data + b.n * y.n + d * y.axis[kD] + h * y.axis[kH] + b.begin[kW] * y.axis[kW];
        Sums<S> g{rows,
                  f.taps,
                  a.in_step * p.C,
                  a.in_tap * p.C,
                  b.begin[kW] * a.in_step + f.start,
                  a.in_step,
                  a.in_tap,
                  a.in,
                  0,
                  nullptr,
                  p.C,
                  nullptr,
                  p.stride,
                  0};
        for (int64_t c = b.c; c < b.c + b.channels; c += kLanes<A>) {
          g.x_shift = g.at * p.C + c, g.dy = dy + c, g.panel = panel + c;
          g.lanes = int(min<int64_t>(kLanes<A>, b.c + b.channels - c));
          add_row(g, n, b.end[kW] - b.begin[kW], end);
        }
      }
  }
}

template <class S>
void channel_weight_grad(const ConvCall& call) {
  typedef Compute<S> A;
  ChannelWeightPlan p = make_channel_weight_plan<S>(call.g);
  View<S> x = view_x<S>(call), y = view_y<S>(call);
  char* scratch = static_cast<char*>(call.scratch);
  Ends<S> end{x.data + call.g.N * x.n, y.data + call.g.N * y.n};
  int64_t size = p.taps * p.stride;
  A* panels = take<A>(scratch, p.pieces * size);
  int threads = team(call.g, call.threads);
  parallel_for(threads, p.pieces * p.blocks.c_blocks, [&](int64_t item, int thread) {
    int64_t c_block = item % p.blocks.c_blocks, part = item / p.blocks.c_blocks;
    A* panel = panels + part * size;
    Block b = block(p.blocks, p.axis, 0, c_block);
    for (int64_t t = 0; t < p.taps; ++t) zero(panel + t * p.stride + b.c, round_up(b.channels, kLanes<A>));
    Range tiles = piece(p.blocks.tiles, p.pieces, part);
    for (int64_t i = tiles.begin; i < tiles.end; ++i)
      add_block<S>(p, block(p.blocks, p.axis, i, c_block), x, y, end,
                   reinterpret_cast<TapRow<S>*>(scratch + thread * row_bytes(p)), panel);
  });
  for (int64_t part = 1; part < p.pieces; ++part)
    for (int64_t i = 0; i < size; i += kLanes<A>) store(panels + i, load(panels + i) + load(panels + part * size + i));
  transpose(panels, p.stride, static_cast<S*>(call.w), p.taps, p.taps, p.C);
}

template <class S>
int64_t channel_weight_bytes(const ConvGeometry& g, int threads) {
  ChannelWeightPlan p = make_channel_weight_plan<S>(g);
  return aligned(p.pieces * p.taps * p.stride * sizeof(Compute<S>)) + row_bytes(p) * threads;
}

}  // namespace
}  // namespace convoxel
