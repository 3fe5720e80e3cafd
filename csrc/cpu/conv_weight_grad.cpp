// Weight gradient H(x, dy):  dw[k, c, t] = sum over images n and outputs o of
// dy[n, k, o] * x[n, c, o * stride + t * dilation - padding].
//
// Rows of the register tile are input channels (with the taps along W where they are adjacent), lanes
// are output channels, and the sum runs over pixels. An item is (piece of the outputs, group, block of
// output channels, block of input channels); each piece sums into a panel of its own, and the
// panels are added in order: no atomics, and the same bits for every number of threads.
#include <type_traits>

#include "conv_weights.h"
#include "gemm.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int64_t kSumPixelsPerPass =
    160;  // of one register pass: dy and x of it stay in L1, and the chain of sums is short
constexpr int64_t kPiecePixels = 1024;             // of the outputs that share a panel, where there are enough
constexpr int64_t kPanelBytes = 64 * 1024 * 1024;  // all pieces' panels together

struct Plan {
  int64_t N, groups, C, K, channel_block, c_blocks, taps;
  Axis axis[kAxes];
  int64_t tiles[kAxes], all_tiles, pieces, items;
  int64_t panel, window, dy_tile, index[kAxes];  // elements of scratch; panel: of one piece
};

inline int64_t window_elements(const Plan& p) {
  int64_t e = p.channel_block;
  for (const Axis& a : p.axis) e *= extent(a, a.tile);
  return e;
}

// W whole where it fits, then H, then D: long sums in registers, small halo.
template <class A>
inline void choose_tiles(Plan& p) {
  for (Axis& a : p.axis) a.tile = 1;
  for (int i = kW; i >= kD; --i) {
    Axis& a = p.axis[i];
    int64_t limit = i == kD ? a.out : min(a.out, max<int64_t>(1, kSumPixelsPerPass / (i == kH ? p.axis[kW].tile : 1)));
    while (a.tile < limit) {
      ++a.tile;
      if (window_elements(p) * int64_t(sizeof(A)) <= kTileBytes) continue;
      --a.tile;
      break;
    }
    a.tile = ceil_div(a.out, ceil_div(a.out, a.tile));
  }
}

template <class A>
Plan make_plan(const ConvGeometry& g) {
  Plan p{};
  p.N = g.N, p.groups = g.groups, p.C = g.C / g.groups, p.K = g.K / g.groups;
  p.channel_block = channel_block(p.C, g.axis[kH].kernel * g.axis[kW].kernel);
  p.c_blocks = ceil_div(p.C, p.channel_block);
  p.taps = 1;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], false), p.taps *= g.axis[a].kernel;
  choose_tiles<A>(p);
  ChannelBlocks<A> blocks(p.K);
  p.panel = p.groups * blocks.padded() * p.C * p.taps;
  int64_t others = p.groups * blocks.count * p.c_blocks;
  for (;;) {
    p.all_tiles = p.N;
    for (int a = 0; a < kAxes; ++a) p.all_tiles *= p.tiles[a] = ceil_div(p.axis[a].out, p.axis[a].tile);
    if (p.all_tiles * others >= kMinItems || p.axis[kD].tile == 1) break;
    p.axis[kD].tile = ceil_div(p.axis[kD].tile, 2);
  }
  int64_t room = max<int64_t>(1, kPanelBytes / (p.panel * int64_t(sizeof(A))));
  // A piece costs a panel to and from memory, so few pixels to a piece only where a team of 16 would have no work.
  int64_t pixels = p.N * p.axis[kD].out * p.axis[kH].out * p.axis[kW].out;
  int64_t worth = max(pixels / kPiecePixels, ceil_div(kMinItems / 4, others));
  p.pieces = min(min(p.all_tiles, worth), min(room, ceil_div(2 * kMinItems, others)));
  p.items = p.pieces * others;
  p.window = window_elements(p);
  p.dy_tile = p.axis[kD].tile * p.axis[kH].tile * p.axis[kW].tile * blocks.width;
  for (int a = 0; a < kAxes; ++a) p.index[a] = extent(p.axis[a], p.axis[a].tile);
  return p;
}

template <class A>
struct Rows {  // dy or x of a tile: the tensor itself, or a packed copy [D, H, W, width]
  const A* data;
  int64_t axis[kAxes];
};

template <class S, class A>
Rows<A> pack_dy(const View<S>& y, int64_t n, int64_t k, int64_t channels, int64_t width, const TileAxis* t, A* tile) {
  const S* from = y.data + n * y.n + k * y.c;
  for (int a = 0; a < kAxes; ++a) from += t[a].begin * y.axis[a];
  if constexpr (std::is_same<S, A>::value) {
    if (y.c == 1 && channels == width) return {from, {y.axis[kD], y.axis[kH], y.axis[kW]}};
  }
  Rows<A> rows{tile, {t[kH].n * t[kW].n * width, t[kW].n * width, width}};
  if (channels < width) zero(tile, t[kD].n * rows.axis[kD]);
  for (int64_t d = 0; d < t[kD].n; ++d)
    for (int64_t h = 0; h < t[kH].n; ++h) {
      const S* src = from + d * y.axis[kD] + h * y.axis[kH];
      A* dst = tile + d * rows.axis[kD] + h * rows.axis[kH];
      if (y.c != 1) transpose(src, y.c, dst, width, channels, t[kW].n);
      else
        for (int64_t i = 0; i < t[kW].n; ++i) convert(src + i * y.axis[kW], dst + i * width, channels);
    }
  return rows;
}

template <class S, class A>
Rows<A> pack_x(const Joined<S>& x, int64_t n, int64_t c, int64_t channels, const PackedAxis* packed, A* window) {
  if constexpr (std::is_same<S, A>::value) {
    const int64_t* axis = x.part[0].axis;
    if (x.one() && x.last() && lies_in_x(packed))
      return {window_in(x.part[0], n, c, packed), {axis[kD], axis[kH], axis[kW]}};
  }
  pack_window(x, n, c, packed, channels, window);
  int64_t row = packed[kW].extent * channels;
  return {window, {packed[kH].extent * row, row, channels}};
}

// Adds one tile to the panel [tap, c, width] of its block.
template <class A, int V>
void add_tile(const Plan& p, const TileAxis* t, const Rows<A>& x_tile, int64_t channels, const Rows<A>& dy, A* panel) {
  const int64_t *x_axis = x_tile.axis, width = V * kLanes<A>;
  int64_t taps_w = p.axis[kW].kernel, rows = channels;
  if (t[kW].tap_step * x_axis[kW] == channels) rows *= taps_w, taps_w = 1;  // (tap, c) is contiguous: one run of rows
  OuterTile<A> o{
      {t[kH].n, t[kW].n}, {t[kH].out_step * x_axis[kH], t[kW].out_step * x_axis[kW]}, {dy.axis[kH], dy.axis[kW]}};
  constexpr int R = tile_rows(V);
  int64_t parts = ceil_div(rows, R);
  for (int64_t d = 0; d < t[kD].n; ++d)
    for (int64_t kd = 0; kd < p.axis[kD].kernel; ++kd)
      for (int64_t kh = 0; kh < p.axis[kH].kernel; ++kh)
        for (int64_t kw = 0; kw < taps_w; ++kw) {
          const A* x = x_tile.data + (d * t[kD].out_step + kd * t[kD].tap_step) * x_axis[kD] +
                       kh * t[kH].tap_step * x_axis[kH] + kw * t[kW].tap_step * x_axis[kW];
          A* dw = panel + ((kd * p.axis[kH].kernel + kh) * taps_w + kw) * rows * width;
          for (int64_t i = 0; i < parts; ++i) {
            Range r = piece(rows, parts, i);
            if (p.taps == 1) {  // a pixel is read once: the next tile is fetched during this one
              Range ahead = piece(t[kW].n, parts, i);
              for (int64_t at = t[kW].n + ahead.begin; at < t[kW].n + ahead.end; ++at)
                fetch(x + at * x_axis[kW], channels), fetch(dy.data + at * dy.axis[kW], width);
            }
            with_rows<R>(r.end - r.begin, [&](auto T) {
              outer_tile<A, T(), V>(o, x + r.begin, dy.data + d * dy.axis[kD], dw + r.begin * width);
            });
          }
        }
}

template <class A>
int64_t thread_bytes(const Plan& p) {
  int64_t each = aligned(p.window * sizeof(A)) + aligned(p.dy_tile * sizeof(A));
  for (int a = 0; a < kAxes; ++a) each += aligned(p.index[a] * 8);
  return each;
}

template <class S>
void weight_grad(const ConvCall& shaped) {
  ConvCall call = flattened(shaped);
  typedef Compute<S> A;
  Plan p = make_plan<A>(call.g);
  ChannelBlocks<A> blocks(p.K);
  Joined<S> x = join_x<S>(call);
  View<S> y = view_y<S>(call);
  char* scratch = static_cast<char*>(call.scratch);
  A* panels = take<A>(scratch, p.pieces * p.panel);
  int64_t per_thread = thread_bytes<A>(p);
  int threads = team(call.g, call.threads);
  parallel_for(threads, p.items, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    A* window = take<A>(mine, p.window);
    A* dy_tile = take<A>(mine, p.dy_tile);
    PackedAxis packed[kAxes];
    for (int a = 0; a < kAxes; ++a) packed[a].index = take<int64_t>(mine, p.index[a]);
    int64_t cb = item % p.c_blocks, rest = item / p.c_blocks, kb = rest % blocks.count;
    rest /= blocks.count;
    int64_t group = rest % p.groups, part = rest / p.groups;
    int64_t c0 = cb * p.channel_block, channels = min(p.channel_block, p.C - c0), width = blocks.padded_width(kb);
    A* panel =
        panels + part * p.panel + (group * blocks.padded() + kb * blocks.width) * p.C * p.taps + c0 * p.taps * width;
    zero(panel, p.taps * channels * width);
    Range tiles = piece(p.all_tiles, p.pieces, part);
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      TileAxis t[kAxes];
      int64_t at = i;
      for (int a = kW; a >= kD; --a) {
        t[a] = place_axis(p.axis[a], at % p.tiles[a], packed[a]);
        at /= p.tiles[a];
      }
      Rows<A> rows = pack_x(x, at, group * p.C + c0, channels, packed, window);
      Rows<A> dy = pack_dy(y, at, group * p.K + kb * blocks.width, blocks.used(kb), width, t, dy_tile);
      with_vectors(blocks.vectors(kb), [&](auto V) { add_tile<A, V()>(p, t, rows, channels, dy, panel); });
    }
  });
  unpack_weights(Weights{false, p.groups, p.C, p.K, p.taps, p.channel_block}, blocks, panels, p.pieces,
                 static_cast<S*>(call.w), threads);
}

template <class S>
int64_t weight_grad_scratch(const ConvGeometry& g, int threads) {
  typedef Compute<S> A;
  Plan p = make_plan<A>(flattened({g, {}, 0, 0, 0, 0, 0}).g);
  return aligned(p.pieces * p.panel * sizeof(A)) + thread_bytes<A>(p) * threads;
}

// Bias gradient: y [N, K, D, H, W] summed over all but K. An item is (image, channel) of a contiguous
// tensor, or 4,096 pixels of a channels-last one; the partial sums are added in double, in order.
constexpr int64_t kSumPixels = 4096;

template <class S>
void sum_plane(const S* y, int64_t n, Compute<S>* sum) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[4] = {};
  double total = 0;
  for (int64_t i = 0; i < n;) {
    for (int64_t end = min(n, i + kSumPixels); i < end; i += L)
      acc[i / L % 4] += i + L <= n ? load(y + i) : load(y + i, int(n - i));
    Vec<A> v = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    for (int l = 0; l < L; ++l) total += v[l];
    for (Vec<A>& a : acc) a = Vec<A>{};
  }
  *sum = A(total);
}

template <class S>
void sum_pixels(const S* y, int64_t pixels, int64_t K, Compute<S>* sum) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < K; k += L) {
    int n = int(min<int64_t>(L, K - k));
    Vec<A> acc[2] = {};
    for (int64_t i = 0; i < pixels; ++i) acc[i & 1] += n == L ? load(y + i * K + k) : load(y + i * K + k, n);
    store(sum + k, acc[0] + acc[1], n);
  }
}

inline int64_t volume(const ConvGeometry& g) { return g.axis[kD].out * g.axis[kH].out * g.axis[kW].out; }
inline int64_t partial_sums(const ConvGeometry& g) { return g.y_last ? ceil_div(g.N * volume(g), kSumPixels) : g.N; }

template <class S>
void bias_grad(const ConvCall& call) {
  typedef Compute<S> A;
  const ConvGeometry& g = call.g;
  const S* y = static_cast<const S*>(call.y);
  A* sums = static_cast<A*>(call.scratch);  // [partial sums, K]
  int64_t parts = partial_sums(g), pixels = g.y_last ? g.N * volume(g) : volume(g);
  parallel_for(g.N * g.K * volume(g) < 65536 ? 1 : call.threads, g.y_last ? parts : g.N * g.K, [&](int64_t i, int) {
    if (g.y_last) sum_pixels(y + i * kSumPixels * g.K, min(kSumPixels, pixels - i * kSumPixels), g.K, sums + i * g.K);
    else sum_plane(y + i * pixels, pixels, sums + i);
  });
  for (int64_t k = 0; k < g.K; ++k) {
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += sums[i * g.K + k];
    from_compute(A(total), static_cast<S*>(call.b)[k]);
  }
}

template <class S>
int64_t bias_grad_scratch(const ConvGeometry& g, int) {
  return aligned(partial_sums(g) * g.K * sizeof(Compute<S>));
}

template <class S>
constexpr ConvKernel weight_entry() {
  return {weight_grad<S>, weight_grad_scratch<S>};
}
template <class S>
constexpr ConvKernel bias_entry() {
  return {bias_grad<S>, bias_grad_scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvKernel conv_weight_grad[kDTypes] = {weight_entry<float>(), weight_entry<bfloat16>(),
                                                     weight_entry<double>()};
extern const ConvKernel conv_bias_grad[kDTypes] = {bias_entry<float>(), bias_entry<bfloat16>(), bias_entry<double>()};
}  // namespace CONVOXEL_ISA

}  // namespace convoxel
