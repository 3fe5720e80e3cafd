// Weight gradient H(x, dy) of bfloat16 by tiles (AMX):  dw[k, c, t] = sum over images n and outputs o of
// dy[n, k, o] x[n, c, o * stride + t * dilation - padding].
//
// The sum of a tile runs over 32 positions: rows of dy are output channels, and x lies in pairs of positions, each
// channel beside itself. A tap along W shifts x by one position, so x is packed once for every tap along W, and all
// taps then see pairs that begin at even positions. An item is (piece of the outputs, some blocks of output channels,
// some of input channels); a piece goes along D with the slices of x that it needs in a ring, sums into panels of
// its own, and the panels are added in order: the same bits for every number of threads.
#include "amx_pairs.h"
#include "tables.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kRingBytes = 768 * 1024;           // of x; dy has a fifth of it or less
constexpr int64_t kPanelBytes = 8 * 1024 * 1024;     // of all pieces together, unless one is larger
constexpr int64_t kMinPieces = 16, kMostBlocks = 4;  // of items; of channels in an item
constexpr int64_t kSlabPositions = 512;              // a slab has so many where it can
constexpr int64_t kPassSteps = 16;                   // 512 positions: 32 KB of dy stay in L1 for all taps
constexpr int64_t kPanel = 32 * 32;                  // sums of one tap, 32 output and 32 input channels

struct Plan {
  int64_t N, C, K, c_blocks, k_blocks, taps;
  int64_t c_per_item, k_per_item, c_chunks, k_chunks;
  Axis axis[kAxes];
  bool by_taps;  // rows along H
  int64_t tiles[kAxes], slabs, pieces, items;
  int64_t ring, plane, steps;               // slices; positions and steps of a slice of dy
  int64_t x_lines, dy_lines, lines, index;  // of scratch: lines of 32 channels, but index
};

inline int64_t even(int64_t n) { return round_up(n, 2); }
inline int64_t slice_lines(const Plan& p) {
  return p.axis[kW].kernel * even(p.axis[kW].tile) * packed_extent(p.axis[kH], p.axis[kH].tile, p.by_taps);
}

// Rows along W whole, then several along H, whose halo is packed twice; slabs only where slices are small.
inline void choose_tiles(Plan& p) {
  Axis *d = &p.axis[kD], *h = &p.axis[kH], *w = &p.axis[kW];
  auto fits = [&] {
    p.ring = dense_extent(*d, d->tile);
    return p.ring * slice_lines(p) * p.c_per_item * kChannels * int64_t(sizeof(bfloat16)) <= kRingBytes;
  };
  d->tile = h->tile = 1, w->tile = w->out;
  while (!fits() && w->tile > kStepPositions) w->tile = round_up(ceil_div(w->tile, 2), kStepPositions);
  while (h->tile < h->out) {
    ++h->tile;
    if (fits()) continue;
    --h->tile;
    break;
  }
  h->tile = ceil_div(h->out, ceil_div(h->out, h->tile));
  d->tile = min(d->out, ceil_div(kSlabPositions, h->tile * w->tile));
  while (d->tile > 1 && !fits()) --d->tile;
  fits();
}

inline Plan make_plan(const ConvGeometry& g) {
  Plan p{};
  p.N = g.N, p.C = g.C, p.K = g.K, p.taps = 1;
  p.c_blocks = ceil_div(g.C, kChannels), p.k_blocks = ceil_div(g.K, kOutputs);
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], false), p.taps *= g.axis[a].kernel;
  p.by_taps = g.axis[kH].stride > 1;
  p.c_per_item = min(p.c_blocks, kMostBlocks), p.k_per_item = min(p.k_blocks, kMostBlocks);
  int64_t panels = max<int64_t>(1, kPanelBytes / (p.c_blocks * p.k_blocks * p.taps * kPanel * int64_t(sizeof(float))));
  for (;;) {
    choose_tiles(p);
    p.slabs = p.N;
    for (int a = 0; a < kAxes; ++a) p.slabs *= p.tiles[a] = ceil_div(p.axis[a].out, p.axis[a].tile);
    p.c_chunks = ceil_div(p.c_blocks, p.c_per_item), p.k_chunks = ceil_div(p.k_blocks, p.k_per_item);
    int64_t others = p.c_chunks * p.k_chunks;
    p.pieces = min(p.slabs, min(panels, ceil_div(2 * kMinPieces, others)));
    p.items = p.pieces * others;
    if (p.items >= kMinPieces || p.c_per_item * p.k_per_item == 1) break;
    int64_t& more = p.c_per_item > p.k_per_item ? p.c_per_item : p.k_per_item;
    more = ceil_div(more, 2);
  }
  p.plane = p.axis[kH].tile * even(p.axis[kW].tile), p.steps = ceil_div(p.plane, kStepPositions);
  p.x_lines = p.c_per_item * p.ring * slice_lines(p) + kStepPositions;
  p.dy_lines = p.axis[kD].tile * p.steps * kStepPositions;
  p.lines = round_up(max(p.axis[kW].in, p.axis[kW].out), kRows);
  p.index = packed_extent(p.axis[kH], p.axis[kH].tile, p.by_taps);
  return p;
}

// One piece ----------------------------------------------------------------------------------------

struct Item {
  const Plan* p;
  PackedAxis rows_of_x;  // along H
  TileAxis tile[kAxes];
  Window steps;      // of x
  int64_t* held;     // [ring]: which slice of x lies there, or -1
  bfloat16 *x, *dy;  // dy: tiles [block of k][slab's slice][step][half][16][32]
  bfloat16 *rows, *lines, *tail;
};

inline void add_products(const Step* steps, int64_t n, const bfloat16* x, const bfloat16* dy, bool first, float* sums) {
  constexpr int64_t kSumRow = 32 * sizeof(float), kPairRow = 2 * kChannels * sizeof(bfloat16);
  const char *xs = reinterpret_cast<const char*>(x), *ys = reinterpret_cast<const char*>(dy);
  settle();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumRow);
    _tile_loadd(1, sums + 16, kSumRow);
    _tile_loadd(2, sums + 16 * 32, kSumRow);
    _tile_loadd(3, sums + 16 * 32 + 16, kSumRow);
  }
  for (int64_t i = 0; i < n; ++i) {
    _tile_loadd(4, ys + steps[i].w, 64);
    _tile_stream_loadd(6, xs + steps[i].x, kPairRow);
    _tile_stream_loadd(7, xs + steps[i].x + 64, kPairRow);
    _tile_loadd(5, ys + steps[i].w + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kSumRow);
  _tile_stored(1, sums + 16, kSumRow);
  _tile_stored(2, sums + 16 * 32, kSumRow);
  _tile_stored(3, sums + 16 * 32 + 16, kSumRow);
}

// One row of x along W, all its blocks of channels, once for every tap along W.
inline void pack_x_row(const Item& it, const View<bfloat16>& x, const bfloat16* row, int64_t channels, bfloat16* to) {
  const Axis& w = it.p->axis[kW];
  for (int64_t b = 0; b * kChannels < channels; ++b, to += it.steps.block * kChannels) {
    int64_t some = min(kChannels, channels - b * kChannels), step = x.axis[kW];
    const bfloat16* src = row + b * kChannels * x.c;
    if (x.c != 1) {
      gather_lines(src, x.c, some, w.in, it.lines);
      src = it.lines, step = kChannels;
    }
    for (int64_t q = 0; q < w.kernel; ++q)
      pack_pairs(src, step, first_lanes(some), it.tile[kW].begin * w.in_step + w.lowest + q * w.in_tap, w.in_step, w.in,
                 it.tile[kW].n, to + q * it.steps.copy * kChannels);
  }
}

// The slices of x that this slab reads and the ring does not hold.
inline void pack_x(Item& it, const Joined<bfloat16>& x, int64_t n, int64_t c0, int64_t channels) {
  const Plan& p = *it.p;
  const Window& to = it.steps;
  int64_t extent = dense_extent(p.axis[kD], it.tile[kD].n);
  for (int64_t i = 0; i < extent; ++i) {
    int64_t at = it.tile[kD].begin * p.axis[kD].in_step + i, slot = at % p.ring, id = at + p.axis[kD].lowest;
    if (it.held[slot] == at) continue;
    it.held[slot] = at;
    for (int64_t h = 0; h < it.rows_of_x.extent; ++h) {
      int64_t ih = it.rows_of_x.index[h];
      bfloat16* row = it.x + (slot * to.slice + h * to.row) * kChannels;
      if (id >= 0 && id < p.axis[kD].in && ih >= 0) {
        for_parts(x, c0, channels, [&](const View<bfloat16>& part, int64_t at_c, int64_t some, int64_t from) {
          const bfloat16* src = part.data + n * part.n + at_c * part.c + id * part.axis[kD] + ih * part.axis[kH];
          pack_x_row(it, part, src, some, row + from * to.block);
        });
        continue;
      }
      for (int64_t b = 0; b < to.blocks; ++b)
        for (int64_t q = 0; q < to.copies; ++q) zero(row + (b * to.block + q * to.copy) * kChannels, to.w * kChannels);
    }
  }
}

// Of channels-last dy whose rows along W are whole steps: from where it lies.
inline void turn_rows(const Item& it, const View<bfloat16>& y, int64_t n, int64_t k0, int64_t channels) {
  const TileAxis* t = it.tile;
  bfloat16* to = it.dy;
  for (int64_t k = 0; k < channels; k += kOutputs)
    for (int64_t d = t[kD].begin; d < t[kD].begin + t[kD].n; ++d)
      for (int64_t h = t[kH].begin; h < t[kH].begin + t[kH].n; ++h) {
        const bfloat16* row = y.data + n * y.n + k0 + k + d * y.axis[kD] + h * y.axis[kH];
        for (int64_t w = 0; w < t[kW].n; w += kStepPositions, to += kStepPositions * kChannels)
          turn(row + (t[kW].begin + w) * y.axis[kW], y.axis[kW], first_lanes(channels - k), to);
      }
}

inline void pack_dy(const Item& it, const View<bfloat16>& y, int64_t n, int64_t k0, int64_t channels, int64_t* index) {
  const Plan& p = *it.p;
  const TileAxis *h = &it.tile[kH], *w = &it.tile[kW];
  int64_t wide = even(w->n), plane = h->n * wide, steps = ceil_div(plane, kStepPositions);
  if (y.c == 1 && w->n % kStepPositions == 0) return turn_rows(it, y, n, k0, channels);
  PackedAxis a[kAxes] = {{it.tile[kD].n, true, it.tile[kD].begin, p.axis[kD].out, index},
                         {h->n, true, h->begin, p.axis[kH].out, index + it.tile[kD].n},
                         {wide, true, w->begin, p.axis[kW].out, nullptr}};
  for (int i : {kD, kH})
    for (int64_t j = 0; j < a[i].extent; ++j) a[i].index[j] = a[i].first + j;
  Window lines{wide, 1, wide, plane, steps * kStepPositions, steps * kStepPositions * it.tile[kD].n, 1, 1};
  for (int64_t k = 0; k < channels; k += kOutputs) {
    View<bfloat16> from = y;
    from.data += (k0 + k) * y.c;
    pack_slices(from, n, min(kOutputs, channels - k), a, lines, 0, it.rows, it.lines);
    bfloat16* to = it.dy + k * lines.block;
    for (int64_t d = 0; d < it.tile[kD].n; ++d) {
      bfloat16* slice = it.rows + d * lines.slice * kChannels;
      zero(slice + plane * kChannels, (lines.slice - plane) * kChannels);
      for (int64_t s = 0; s < lines.slice; s += kStepPositions)
        turn(slice + s * kChannels, kChannels, ~0u, to + (d * lines.slice + s) * kChannels);
    }
  }
}

// Adds a slab to the panels [tap][32 k][32 c] of one block of k and one of c, or begins them. Steps that reach beyond a
// slice have zeros of dy there, and get zeros of x, too: what lies there need not be finite.
inline void add_slab(const Item& it, const bfloat16* x, const bfloat16* dy, bool first, float* panel) {
  const Plan& p = *it.p;
  constexpr int64_t kLine = kChannels * sizeof(bfloat16);
  const int64_t taps_h = p.axis[kH].kernel, taps_w = p.axis[kW].kernel;
  int64_t plane = it.tile[kH].n * even(it.tile[kW].n), per_slice = ceil_div(plane, kStepPositions);
  int64_t rest = plane % kStepPositions, all = it.tile[kD].n * per_slice;
  for (int64_t begin = 0; begin < all; begin += kPassSteps)
    for (int64_t kd = 0; kd < p.axis[kD].kernel; ++kd) {
      Step steps[kPassSteps];
      int64_t n = min(kPassSteps, all - begin);
      for (int64_t i = 0; i < n; ++i) {
        int64_t d = (begin + i) / per_slice, s = (begin + i) % per_slice;
        int64_t slot = ((it.tile[kD].begin + d) * p.axis[kD].in_step + kd * p.axis[kD].in_tap) % p.ring;
        steps[i] = {(slot * it.steps.slice + s * kStepPositions) * kLine, (begin + i) * kStepPositions * kLine};
      }
      for (int64_t kh = 0; kh < taps_h; ++kh)
        for (int64_t kw = 0; kw < taps_w; ++kw) {
          const bfloat16* at = x + (kw * it.steps.copy + kh * it.tile[kH].tap_step * it.steps.row) * kChannels;
          float* sums = panel + ((kd * taps_h + kh) * taps_w + kw) * kPanel;
          if (rest == 0) {
            add_products(steps, n, at, dy, first && begin == 0, sums);
            continue;
          }
          Step moved[kPassSteps];
          int64_t base = reinterpret_cast<const char*>(it.tail) - reinterpret_cast<const char*>(at), tails = 0;
          for (int64_t i = 0; i < n; ++i) {
            moved[i] = steps[i];
            if ((begin + i) % per_slice != per_slice - 1) continue;
            bfloat16* copy = it.tail + tails * kStepPositions * kChannels;
            __builtin_memcpy(copy, reinterpret_cast<const char*>(at) + steps[i].x, size_t(rest * kLine));
            zero(copy + rest * kChannels, (kStepPositions - rest) * kChannels);
            moved[i].x = base + tails++ * kStepPositions * kLine;
          }
          add_products(moved, n, at, dy, first && begin == 0, sums);
        }
    }
}

inline int64_t thread_bytes(const Plan& p) {
  int64_t line = kChannels * int64_t(sizeof(bfloat16)), each = aligned(p.x_lines * line);
  each += aligned(p.k_per_item * p.dy_lines * line) + aligned(p.dy_lines * line) + aligned(p.lines * line);
  each += aligned(kPassSteps * kStepPositions * line) + aligned(p.ring * 8);
  each += aligned((p.axis[kD].tile + p.axis[kH].tile) * 8);
  return each + aligned(p.index * 8);
}

inline int64_t panel_elements(const Plan& p) { return p.k_blocks * p.c_blocks * p.taps * kPanel; }

inline void add_piece(const Plan& p, const Joined<bfloat16>& x, const View<bfloat16>& y, int64_t item, float* panels,
                      char* mine) {
  TileState state;
  int64_t cc = item % p.c_chunks, kc = item / p.c_chunks % p.k_chunks, part = item / p.c_chunks / p.k_chunks;
  int64_t cb = cc * p.c_per_item, kb = kc * p.k_per_item;
  int64_t c_blocks = min(p.c_per_item, p.c_blocks - cb), k_blocks = min(p.k_per_item, p.k_blocks - kb);
  int64_t channels = min(p.C - cb * kChannels, c_blocks * kChannels);
  int64_t outputs = min(p.K - kb * kOutputs, k_blocks * kOutputs);
  Item it{&p, {}, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  it.x = take<bfloat16>(mine, p.x_lines * kChannels);
  it.dy = take<bfloat16>(mine, p.k_per_item * p.dy_lines * kChannels);
  it.rows = take<bfloat16>(mine, p.dy_lines * kChannels);
  it.lines = take<bfloat16>(mine, p.lines * kChannels);
  it.tail = take<bfloat16>(mine, kPassSteps * kStepPositions * kChannels);
  it.held = take<int64_t>(mine, p.ring);
  int64_t* index = take<int64_t>(mine, p.axis[kD].tile + p.axis[kH].tile);
  it.rows_of_x.index = take<int64_t>(mine, p.index);
  float* panel = panels + part * panel_elements(p);
  auto sums_of = [&](int64_t k, int64_t c) { return panel + ((kb + k) * p.c_blocks + cb + c) * p.taps * kPanel; };
  int64_t begin = part * p.slabs / p.pieces, end = (part + 1) * p.slabs / p.pieces, column = -1;
  for (int64_t slab = begin; slab < end; ++slab) {
    int64_t n = slab / p.tiles[kD];
    if (n != column) {
      column = n;
      for (int64_t i = 0; i < p.ring; ++i) it.held[i] = -1;
    }
    int64_t w = n % p.tiles[kW], h = n / p.tiles[kW] % p.tiles[kH];
    n = n / p.tiles[kW] / p.tiles[kH];
    it.tile[kD] = {slab % p.tiles[kD] * p.axis[kD].tile, 0, true, 0, 0};
    it.tile[kD].n = min(p.axis[kD].tile, p.axis[kD].out - it.tile[kD].begin);
    it.tile[kH] = place(p.axis[kH], h, p.by_taps, it.rows_of_x);
    it.tile[kW] = {w * p.axis[kW].tile, min(p.axis[kW].tile, p.axis[kW].out - w * p.axis[kW].tile), true, 0, 0};
    int64_t wide = even(it.tile[kW].n);
    it.steps = {wide, p.axis[kW].kernel, wide, wide * it.rows_of_x.extent, 0, 0, c_blocks, 1};
    it.steps.slice = it.steps.copy * it.steps.copies, it.steps.block = it.steps.slice * p.ring;
    pack_x(it, x, n, cb * kChannels, channels);
    pack_dy(it, y, n, kb * kOutputs, outputs, index);
    int64_t dy_block = it.tile[kD].n * round_up(it.tile[kH].n * wide, kStepPositions) * kChannels;
    for (int64_t c = 0; c < c_blocks; ++c)
      for (int64_t k = 0; k < k_blocks; ++k)
        add_slab(it, it.x + c * it.steps.block * kChannels, it.dy + k * dy_block, slab == begin, sums_of(k, c));
  }
}

// dw[k, c, tap]: the panels added in order, their channels put in order. An item is one output channel, 32 input ones.
inline void add_panels(const Plan& p, const float* panels, bfloat16* dw, float* sums, int64_t per_thread, int threads) {
  typedef VecOf<int32_t>::type Order;  // undoes channel_at
  const Order low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}, high = low + 8;
  parallel_for(threads, p.k_blocks * kOutputs * p.c_blocks, [&](int64_t item, int thread) {
    float* mine = sums + thread * per_thread;
    int64_t cb = item % p.c_blocks, row = item / p.c_blocks % kOutputs, kb = item / p.c_blocks / kOutputs;
    int64_t k = kb * kOutputs + channel_at(row / 16, row % 16), channels = min(kChannels, p.C - cb * kChannels);
    if (k >= p.K) return;
    const float* from = panels + (kb * p.c_blocks + cb) * p.taps * kPanel + row * 32;
    for (int64_t t = 0; t < p.taps; ++t) {
      Vec<float> half[2] = {};
      for (int64_t piece = 0; piece < p.pieces; ++piece)
        for (int h = 0; h < 2; ++h) half[h] += load(from + piece * panel_elements(p) + t * kPanel + h * 16);
      store(mine + t * 32, __builtin_shuffle(half[0], half[1], low));
      store(mine + t * 32 + 16, __builtin_shuffle(half[0], half[1], high));
    }
    transpose(mine, 32, dw + (k * p.C + cb * kChannels) * p.taps, p.taps, p.taps, channels);
  });
}

inline int team(const Plan& p, int threads) {
  double products = double(p.N) * double(p.C) * double(p.K) * double(p.taps);
  for (const Axis& a : p.axis) products *= double(a.out);
  return products < double(1 << 24) ? 1 : threads;
}

inline void weight_grad(const ConvCall& call) {
  Plan p = make_plan(call.g);
  Joined<bfloat16> x = join_x<bfloat16>(call);
  View<bfloat16> y = view_y<bfloat16>(call);
  char* scratch = static_cast<char*>(call.scratch);
  float* panels = take<float>(scratch, p.pieces * panel_elements(p));
  float* sums = take<float>(scratch, call.threads * p.taps * 32);
  int threads = team(p, call.threads);
  int64_t per_thread = thread_bytes(p);
  parallel_for(threads, p.items,
               [&](int64_t item, int thread) { add_piece(p, x, y, item, panels, scratch + thread * per_thread); });
  add_panels(p, panels, static_cast<bfloat16*>(call.w), sums, p.taps * 32, threads);
}

inline int64_t weight_grad_scratch(const ConvGeometry& g, int threads) {
  Plan p = make_plan(g);
  return aligned(p.pieces * panel_elements(p) * 4) + aligned(threads * p.taps * 32 * 4) + thread_bytes(p) * threads;
}

constexpr ConvKernel kTiles = {weight_grad, weight_grad_scratch};

#else

constexpr ConvKernel kTiles = {};

#endif

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvKernel conv_amx_weight[kDTypes] = {{}, kTiles, {}};
}

}  // namespace convoxel
