// Direct convolution, forward F(x, w) and input gradient G(dy, w), as one engine.
//
// Both are a correlation  out[o] = sum_t w[t] in[o * step + t * tap + start]  along every axis. For F
// that is the definition. For G with stride s, outputs i = r + s j of equal residue r form a phase that
// uses every s-th tap (every s / gcd(s, dilation)-th), a stride-1 correlation of its own; the phases
// share one packed window. Weights are packed per call into [block of k][block of c][tap][c][k].
//
// An item of work is (image, group, tile of the output, some blocks of output channels):
//   for each block of input channels: pack the window; for each block of output channels, phase, row:
//   passes of a few taps whose weights stay in L1 while a row of register tiles goes by.
#include <type_traits>

#include "conv_moments.h"
#include "conv_weights.h"
#include "gemm.h"
#include "tables.h"

namespace convoxel {
namespace {

struct Plan {
  bool transposed;          // G
  bool w_last, w_float;     // as ConvGeometry has them
  int64_t N, groups, C, K;  // C: input channels, K: output channels, both per group
  int64_t channel_block, blocks_per_item;
  Axis axis[kAxes];
  int64_t tiles[kAxes], items, taps;
  int64_t panel, window, out_tile, index[kAxes];  // elements of scratch
};

inline int64_t window_elements(const Plan& p) {
  return extent(p.axis[kD], p.axis[kD].tile) * extent(p.axis[kH], p.axis[kH].tile) *
         extent(p.axis[kW], p.axis[kW].tile) * p.channel_block;
}

// Tiles as large as the window's budget allows: a few register tiles along W, then H and D in turn.
template <class A>
inline void choose_tiles(Plan& p) {
  Axis *d = &p.axis[kD], *h = &p.axis[kH], *w = &p.axis[kW];
  ChannelBlocks<A> blocks(p.K);
  int64_t step = 4 * tile_rows(blocks.vectors(0)), out = min<int64_t>(blocks.count, 4) * blocks.width;
  d->tile = h->tile = 1;
  int64_t parts = ceil_div(w->count, step / 4);
  w->tile = min(w->count, ceil_div(w->count, parts) * ceil_div(parts, ceil_div(parts, 4)));
  for (bool grown = true; grown;) {
    grown = false;
    for (Axis* a : {h, d}) {
      if (a->tile == a->count || (a == h && h->tile > 2 * d->tile && d->tile < d->count)) continue;
      ++a->tile;
      if (window_elements(p) * int64_t(sizeof(A)) <= kTileBytes) grown = true;
      else --a->tile;
    }
  }
  if (d->count == 1 && h->count == 1) {
    int64_t most = kTileBytes / int64_t(sizeof(A)) / max(p.channel_block * w->in_step, out);
    w->tile = min(w->count, max(w->tile, most / step * step));
  }
  for (Axis* a : {h, d}) a->tile = ceil_div(a->count, ceil_div(a->count, a->tile));
}

inline void count_items(Plan& p, int64_t blocks) {
  p.items = p.N * p.groups * ceil_div(blocks, p.blocks_per_item);
  for (int a = 0; a < kAxes; ++a) p.items *= p.tiles[a] = ceil_div(p.axis[a].count, p.axis[a].tile);
}

template <class A>
Plan make_plan(const ConvGeometry& g, bool transposed) {
  Plan p{};
  p.transposed = transposed, p.w_last = g.w_last, p.w_float = g.w_float;
  p.N = g.N, p.groups = g.groups;
  p.C = (transposed ? g.K : g.C) / g.groups, p.K = (transposed ? g.C : g.K) / g.groups;
  p.channel_block = channel_block(p.C, g.axis[kH].kernel * g.axis[kW].kernel);
  p.taps = 1;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], transposed), p.taps *= g.axis[a].kernel;
  choose_tiles<A>(p);
  ChannelBlocks<A> blocks(p.K);
  p.blocks_per_item = min<int64_t>(blocks.count, 4);
  count_items(p, blocks.count);
  while (p.items < kMinItems && p.blocks_per_item > 1) --p.blocks_per_item, count_items(p, blocks.count);
  for (int a : {kD, kH, kW})
    while (p.items < kMinItems && p.axis[a].tile > (a == kW ? kPassPixels : 1)) {
      p.axis[a].tile = ceil_div(p.axis[a].tile, 2);
      count_items(p, blocks.count);
    }
  p.panel = p.groups * blocks.padded() * p.C * p.taps;
  p.window = window_elements(p);
  p.out_tile = p.blocks_per_item * blocks.width;
  for (int a = 0; a < kAxes; ++a) {
    p.out_tile *= p.axis[a].tile * p.axis[a].phases;
    p.index[a] = extent(p.axis[a], p.axis[a].tile);
  }
  return p;
}

// One item ------------------------------------------------------------------------------------------

template <class A>
struct Item {
  const Plan* p;
  PackedAxis packed[kAxes];
  TileAxis tile[kAxes];
  int64_t channels;       // of this block of c
  const A* window;        // packed, or x itself
  int64_t x_axis[kAxes];  // its steps
  bool ahead;             // x lies in memory and is read once: fetched two register tiles ahead
  bool stream;            // the output is large, and finished in one pass
  Target<A> target;
};

// All rows of one phase, one block of output channels, one block of input channels.
template <class A, int V>
void run_phase(const Item<A>& it, const Phase* f, const A* panel, const A* bias, int tail, A* out) {
  const Plan& p = *it.p;
  int64_t width = V * kLanes<A>, w_axis[kAxes], n[kAxes];
  const int64_t* x_axis = it.x_axis;
  w_axis[kW] = it.channels * width;
  w_axis[kH] = p.axis[kW].kernel * w_axis[kW];
  w_axis[kD] = p.axis[kH].kernel * w_axis[kH];
  CorrelateTile<A> g;
  const A* x = it.window;
  int64_t y_step[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    n[a] = positions(p.axis[a], it.tile[a], f[a]);
    g.taps[a] = f[a].taps;
    g.x_tap[a] = it.tile[a].tap_step * x_axis[a];
    g.w_tap[a] = p.axis[a].w_tap * w_axis[a];
    x += origin(p.axis[a], it.tile[a], f[a]) * x_axis[a];
    panel += f[a].w_first * w_axis[a];
    out += f[a].first * it.target.axis[a];
    y_step[a] = p.axis[a].phases * it.target.axis[a];
  }
  g.channels = it.channels;
  if (g.x_tap[kW] == it.channels && p.axis[kW].w_tap == 1) g.channels *= g.taps[kW], g.taps[kW] = g.taps[kW] > 0;
  g.x_row = it.tile[kW].out_step * x_axis[kW];
  g.y_row = y_step[kW];
  g.tail = tail;
  int64_t planes = g.taps[kD] * g.taps[kH] * (g.taps[kW] > 0);  // 0: only the bias
  int64_t pass = max<int64_t>(1, kPassProducts / max<int64_t>(1, g.taps[kW] * g.channels));
  int64_t all = g.channels, cuts = max<int64_t>(1, ceil_div(all, kPassProducts));  // of one tap's channels
  g.stream = it.stream && planes <= pass && cuts == 1 && tail == kLanes<A>;
  constexpr int R = tile_rows(V);
  constexpr int64_t kSome = kPassPixels / R;  // register tiles of a long row
  int64_t parts = ceil_div(n[kW], R), rows = max<int64_t>(1, kPassPixels / max<int64_t>(1, n[kW]));
  auto over_pixels = [&](int64_t d, int64_t first, int64_t part, const A* from, const A* weights) {
    for (int64_t h = first; h < min(first + rows, n[kH]); ++h) {
      const A* row = from + d * it.tile[kD].out_step * x_axis[kD] + h * it.tile[kH].out_step * x_axis[kH];
      A* y = out + d * y_step[kD] + h * y_step[kH];
      for (int64_t i = part; i < min(part + kSome, parts); ++i) {
        Range r = piece(n[kW], parts, i);
        if (it.ahead && g.bias) fetch(row + (r.end + R) * g.x_row, (r.end - r.begin) * g.x_row);
        with_rows<R>(r.end - r.begin, [&](auto T) {
          correlate_tile<A, T(), V>(g, row + r.begin * g.x_row, weights, y + r.begin * g.y_row);
        });
      }
    }
  };
  for (int64_t d = 0; d < n[kD]; ++d)
    for (int64_t first = 0; first < n[kH]; first += rows)
      for (int64_t part = 0; part < parts; part += kSome)
        for (g.begin = 0; g.begin == 0 || g.begin < planes; g.begin += pass) {
          g.end = min(g.begin + pass, planes);
          for (int64_t cut = 0; cut < cuts; ++cut) {
            Range c = piece(all, cuts, cut);
            g.channels = c.end - c.begin;
            g.bias = g.begin == 0 && cut == 0 ? bias : nullptr;
            over_pixels(d, first, part, x + c.begin, panel + c.begin * width);
          }
        }
}

template <class A>
void run_block(const Item<A>& it, const A* panel, const A* bias, int vectors, int tail, A* out) {
  const Axis* a = it.p->axis;
  for (int64_t d = 0; d < a[kD].phases; ++d)
    for (int64_t h = 0; h < a[kH].phases; ++h)
      for (int64_t w = 0; w < a[kW].phases; ++w) {
        Phase f[kAxes] = {phase(a[kD], d), phase(a[kH], h), phase(a[kW], w)};
        if (!bias && f[kD].taps * f[kH].taps * f[kW].taps == 0) continue;
        with_vectors(vectors, [&](auto V) { run_phase<A, V()>(it, f, panel, bias, tail, out); });
      }
}

template <class S, class A>
void correlate(const Plan& p, const Joined<S>& x, const S* w, const S* b, const Joined<S>& y, const Slots& slots,
               char* scratch, int threads) {
  ChannelBlocks<A> blocks(p.K);
  A* panel = take<A>(scratch, p.panel);
  Weights weights{p.transposed, p.groups, p.C, p.K, p.taps, p.channel_block, p.w_last, p.w_float};
  pack_weights(weights, blocks, w, panel, threads);
  constexpr bool same = std::is_same<S, A>::value;
  const View<S>& y0 = y.part[0];
  bool direct = same && y.one() && y.last();  // sums go straight to the output
  bool large = direct && !slots.data && p.C <= p.channel_block && p.N * y0.n * int64_t(sizeof(S)) >= kStreamBytes;
  bool aligned_rows = y0.axis[kW] % kLanes<A> == 0 && p.K % kLanes<A> == 0 && streamable(y0.data);
  int64_t chunks = ceil_div(blocks.count, p.blocks_per_item), width = p.blocks_per_item * blocks.width;
  int64_t per_thread = aligned(p.window * sizeof(A)) + aligned(p.out_tile * sizeof(A)) + aligned(width * sizeof(A));
  for (int a = 0; a < kAxes; ++a) per_thread += aligned(p.index[a] * 8);
  parallel_for(threads, p.items, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    A* window = take<A>(mine, p.window);
    A* out_tile = take<A>(mine, p.out_tile);
    A* bias = take<A>(mine, width);
    // Items next to each other share the window: blocks of k first, then W, H, D, group, image.
    int64_t chunk = item % chunks, rest = item / chunks, slot = rest % slots.of_image;
    Item<A> it{&p, {}, {}, 0, window, {}, false, large && aligned_rows, {}};
    for (int a = kW; a >= kD; --a) {
      it.packed[a].index = take<int64_t>(mine, p.index[a]);
      it.tile[a] = place_axis(p.axis[a], rest % p.tiles[a], it.packed[a]);
      rest /= p.tiles[a];
    }
    int64_t group = rest % p.groups, n = rest / p.groups;
    int64_t first = chunk * p.blocks_per_item, last = min(first + p.blocks_per_item, blocks.count);
    int64_t k0 = first * blocks.width, channels = min(p.K - k0, width);
    zero(bias, width);
    if (b) convert(b + group * p.K + k0, bias, channels);
    Box box;
    for (int a = 0; a < kAxes; ++a) {
      box.begin[a] = it.tile[a].begin * p.axis[a].phases;
      box.size[a] = min(it.tile[a].n * p.axis[a].phases, p.axis[a].out - box.begin[a]);
    }
    int64_t sw = p.axis[kW].tile * p.axis[kW].phases, sh = p.axis[kH].tile * p.axis[kH].phases;
    it.target = {out_tile, {sh * sw * width, sw * width, width}};
    if constexpr (same) {
      if (direct) it.target = target_in(y0, box, n, group * p.K + k0);
    }
    bool in_place = same && x.one() && x.last() && lies_in_x(it.packed);
    it.ahead = in_place && blocks.count == 1 && p.taps == 1;
    for (int64_t c = 0; c < p.C; c += p.channel_block) {
      it.channels = min(p.channel_block, p.C - c);
      if constexpr (same) {
        if (in_place) it.window = window_in(x.part[0], n, group * p.C + c, it.packed);
      }
      if (!in_place) pack_window(x, n, group * p.C + c, it.packed, it.channels, window);
      it.x_axis[kW] = in_place ? x.part[0].axis[kW] : it.channels;
      it.x_axis[kH] = in_place ? x.part[0].axis[kH] : it.packed[kW].extent * it.x_axis[kW];
      it.x_axis[kD] = in_place ? x.part[0].axis[kD] : it.packed[kH].extent * it.x_axis[kH];
      for (int64_t kb = first; kb < last; ++kb) {
        const A* weights =
            panel + (group * blocks.padded() + kb * blocks.width) * p.C * p.taps + c * p.taps * blocks.padded_width(kb);
        int64_t at = (kb - first) * blocks.width;
        run_block(it, weights, c == 0 ? bias + at : nullptr, blocks.vectors(kb), direct ? blocks.tail(kb) : kLanes<A>,
                  it.target.data + at);
      }
    }
    if (it.stream) end_streams();
    if (slots.data) gather_moments<S>(it.target, box.size, slots, n, slot, group * p.K + k0, channels);
    if (!direct) flush(it.target, y, box, n, group * p.K + k0, channels);
  });
}

template <class A>
int64_t scratch_bytes(const Plan& p, int threads) {
  ChannelBlocks<A> blocks(p.K);
  int64_t each = aligned(p.window * sizeof(A)) + aligned(p.out_tile * sizeof(A)) +
                 aligned(p.blocks_per_item * blocks.width * sizeof(A));
  for (int a = 0; a < kAxes; ++a) each += aligned(p.index[a] * 8);
  return aligned(p.panel * sizeof(A)) + each * threads;
}

inline int64_t slot_count(const Plan& p) { return p.tiles[kD] * p.tiles[kH] * p.tiles[kW]; }

template <class S>
int64_t slots(const ConvGeometry& g) {
  ConvGeometry flat = flattened({g, {}, 0, 0, 0, 0, 0}).g;
  return flat.N == g.N ? slot_count(make_plan<Compute<S>>(flat, false))
                       : 0;  // an item may hold parts of several images
}

template <class S>
void forward(const ConvCall& shaped) {
  ConvCall call = flattened(shaped);
  Plan p = make_plan<Compute<S>>(call.g, false);
  correlate<S, Compute<S>>(p, join_x<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           join_y<S>(call), {call.moments, slot_count(p), call.g.K}, static_cast<char*>(call.scratch),
                           team(call.g, call.threads));
}

template <class S>
void input_grad(const ConvCall& shaped) {
  ConvCall call = flattened(shaped);
  Plan p = make_plan<Compute<S>>(call.g, true);
  correlate<S, Compute<S>>(p, join_y<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           join_x<S>(call), {nullptr, 1, 0}, static_cast<char*>(call.scratch),
                           team(call.g, call.threads));
}

template <class S, bool transposed>
int64_t correlate_scratch(const ConvGeometry& g, int threads) {
  return scratch_bytes<Compute<S>>(make_plan<Compute<S>>(flattened({g, {}, 0, 0, 0, 0, 0}).g, transposed), threads);
}

template <class S>
constexpr ConvCorrelate entries() {
  return {forward<S>, input_grad<S>, correlate_scratch<S, false>, correlate_scratch<S, true>, slots<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_direct[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
