// Convolution F(x, w) and input gradient G(dy, w) of bfloat16 by tiles (AMX), as phases of correlations like
// conv_direct.cpp:  out[o] = sum_t w[t] in[o * step + t * tap + start].
//
// An item of work is (image, piece of D, tile of H and W, some pairs of blocks of output channels). It goes along D
// in slabs: the window of x is packed, what it shares with the one before is kept; then for every 32 output channels
// and every 32 positions all taps and input channels are summed up in four tiles: 4 products for 4 loads. The
// weights of 32 output channels (54 KB at 32 input channels, 540 KB at 320) stream from L2, which bounds the products
// of a Sapphire Rapids at 0.8 of the peak for 32 input channels and 0.7 for more. Tried without gain: passes whose
// weights stay in L1 (the sums then move instead), tiles of 3 x 2, 4 x 1 and 6 x 1, weights prefetched to L1.
#include "amx_plan.h"
#include "amx_weights.h"
#include "conv_moments.h"
#include "tables.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

// One item ------------------------------------------------------------------------------------------

struct Item {
  const Plan* p;
  PackedAxis packed[kAxes];
  TileAxis tile[kAxes];
  Window steps;
  const bfloat16* window;
  Step* sum;
  float* sums;   // [2][32 positions, 32]
  Ahead* ahead;  // of x
};

// How the positions of one phase's slab are cut into tiles: 16 each of `slice` positions, `pitch` of them a row.
struct Positions {
  int64_t n[kAxes], pitch, per_slice;
  int64_t d, h, w;  // steps of the window
  const bfloat16* x;

  const bfloat16* tile(int64_t i) const {
    int64_t at = i % per_slice * kRows;
    return x + (i / per_slice * d + at / pitch * h + at % pitch * w) * kChannels;
  }
};

inline Positions place_positions(const Item& it, const Phase* f) {
  const Plan& p = *it.p;
  Positions s{};
  int64_t start[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    s.n[a] = positions(p.axis[a], it.tile[a], f[a]);
    start[a] = origin(p.axis[a], it.tile[a], f[a]);
  }
  s.d = it.tile[kD].out_step * it.steps.slice, s.h = it.tile[kH].out_step * it.steps.row;
  s.w = it.tile[kW].out_step * it.steps.position;
  s.pitch = p.flat ? it.steps.w : round_up(s.n[kW], kRows);
  s.per_slice = ceil_div(p.flat ? (s.n[kH] - 1) * s.pitch + s.n[kW] : s.n[kH] * s.pitch, kRows);
  int64_t w = p.by_taps[kW] ? f[kW].w_first * it.steps.copy : start[kW];
  s.x = it.window + (start[kD] * it.steps.slice + start[kH] * it.steps.row + w) * kChannels;
  return s;
}

// The steps of the sum: all blocks of channels, all taps of the phase.
inline int64_t list_steps(const Item& it, const Phase* f) {
  const Plan& p = *it.p;
  int64_t x_tap[kAxes], w_tap[kAxes], w_first = 0, n = 0;
  x_tap[kD] = it.tile[kD].tap_step * it.steps.slice, x_tap[kH] = it.tile[kH].tap_step * it.steps.row;
  x_tap[kW] = p.by_taps[kW] ? p.axis[kW].w_tap * it.steps.copy : it.tile[kW].tap_step;
  for (int64_t a = kW, step = 1; a >= kD; step *= p.axis[a--].kernel)
    w_tap[a] = p.axis[a].w_tap * step, w_first += f[a].w_first * step;
  for (int64_t b = 0; b < p.blocks; ++b)
    for (int64_t d = 0; d < f[kD].taps; ++d)
      for (int64_t h = 0; h < f[kH].taps; ++h)
        for (int64_t w = 0; w < f[kW].taps; ++w) {
          int64_t x = b * it.steps.block + d * x_tap[kD] + h * x_tap[kH] + w * x_tap[kW];
          int64_t tap = b * p.taps + w_first + d * w_tap[kD] + h * w_tap[kH] + w * w_tap[kW];
          it.sum[n++] = {x * kChannels * int64_t(sizeof(bfloat16)), tap * kStepWeights * int64_t(sizeof(bfloat16))};
        }
  return n;
}

// Where the sums go: y of this image, from the first of the output channels and the phase's first position on.
struct Output {
  bfloat16* data;
  int64_t axis[kAxes], c;  // steps
  int64_t channels;        // of 32
  bool stream;             // whole lines, past the caches
  BlockSums<bfloat16>* moments;
};

// Up to 32 positions whose sums wait to be stored, a few at every step of the next sum: their conversion and the wait
// for the tiles then cost nothing (measured: 16 % of the time).
struct Pending {
  const float *sums, *bias;
  bfloat16* to[2 * kRows];  // channels-last, or nullptr: nobody's
  const Output* y;

  void store(int64_t i) const {
    if (!to[i]) return;
    const float* from = sums + i * kOutputs;
    Vec<float> low = load(from) + load(bias), high = load(from + kRows) + load(bias + kRows);
    __m512i v = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    if (y->moments) add(*y->moments, v);
    if (y->stream) _mm512_stream_si512((__m512i*)to[i], v);
    else _mm512_mask_storeu_epi16(to[i], first_lanes(y->channels), v);
  }
  static void add(BlockSums<bfloat16>& moments, __m512i v) {
    VecU16 half[2];
    __builtin_memcpy(half, &v, sizeof v);
    for (int i = 0; i < 2; ++i) {
      if (moments.empty()) moments.start(i * kRows, widen(half[i]));
      moments.add(i * kRows, widen(half[i]));
    }
    moments.passed(1);
  }
  void store_some(int64_t step) const {
    if (step < kRows) store(2 * step), store(2 * step + 1);
  }
};

// f(first row of the tile's sums, first position of y, how many) for each run along W.
template <class F>
inline void for_runs(const Positions& s, int64_t tile, const Output& y, const F& f) {
  bfloat16* slice = y.data + tile / s.per_slice * y.axis[kD];
  int64_t at = tile % s.per_slice * kRows;
  for (int64_t i = 0, h = at / s.pitch, w = at % s.pitch; i < kRows && h < s.n[kH]; ++h, w = 0) {
    int64_t n = min(s.n[kW] - w, kRows - i);
    if (n > 0) f(i, slice + h * y.axis[kH] + w * y.axis[kW], n);
    i += s.pitch - w;
  }
}

// To the contiguous layout.
inline void store_run(float* sums, const float* bias, const Output& y, bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n * kOutputs; i += kRows) store(sums + i, load(sums + i) + load(bias + i % kOutputs));
  if (y.axis[kW] == 1) return transpose(sums, kOutputs, to, y.c, n, y.channels);
  for (int64_t c = 0; c < y.channels; ++c)
    for (int64_t i = 0; i < n; ++i) from_compute(sums[i * kOutputs + c], to[c * y.c + i * y.axis[kW]]);
}

template <int Q>
void run_tiles(const Item& it, const Positions& s, int64_t steps, const bfloat16* panel, const float* bias,
               const Output& y) {
  Pending pending[2] = {{it.sums, bias, {}, &y}, {it.sums + 2 * kRows * kOutputs, bias, {}, &y}};
  int64_t tiles = s.n[kD] * s.per_slice, x_row = s.w * kChannels * int64_t(sizeof(bfloat16));
  int64_t now = 0;
  for (int64_t i = 0; i < tiles; i += 2, now ^= 1) {
    bool two = i + 1 < tiles;
    float* sums = it.sums + now * 2 * kRows * kOutputs;
    const Pending& before = pending[now ^ 1];
    auto aside = [&](int64_t step) {
      before.store_some(step);
      it.ahead->fetch();
      it.ahead->fetch();
    };
    const bfloat16* x[2] = {s.tile(i), s.tile(two ? i + 1 : i)};
    if (two) multiply<2, Q>(it.sum, steps, x, x_row, panel, sums, aside);
    else multiply<1, Q>(it.sum, steps, x, x_row, panel, sums, aside);
    for (int64_t step = steps; step < kRows; ++step) before.store_some(step);
    for (bfloat16*& to : pending[now].to) to = nullptr;
    for (int64_t j = 0; j <= two; ++j)
      for_runs(s, i + j, y, [&](int64_t row, bfloat16* to, int64_t n) {
        row += j * kRows;
        if (y.c != 1) return store_run(sums + row * kOutputs, bias, y, to, n);
        for (int64_t r = 0; r < n; ++r) pending[now].to[row + r] = to + r * y.axis[kW];
      });
  }
  for (int64_t step = 0; step < kRows; ++step) pending[now ^ 1].store_some(step);
}

inline void run_phase(const Item& it, const Phase* f, const bfloat16* panel, const float* bias, const Output& y) {
  Positions s = place_positions(it, f);
  if (min(s.n[kD], min(s.n[kH], s.n[kW])) <= 0) return;
  int64_t steps = list_steps(it, f);
  if (y.channels > kRows) run_tiles<2>(it, s, steps, panel, bias, y);
  else run_tiles<1>(it, s, steps, panel, bias, y);
}

inline void run_pair(const Item& it, const bfloat16* panel, const float* bias, const Output& whole) {
  const Axis* a = it.p->axis;
  for (int64_t d = 0; d < a[kD].phases; ++d)
    for (int64_t h = 0; h < a[kH].phases; ++h)
      for (int64_t w = 0; w < a[kW].phases; ++w) {
        Phase f[kAxes] = {phase(a[kD], d), phase(a[kH], h), phase(a[kW], w)};
        Output y = whole;
        for (int i = 0; i < kAxes; ++i) {
          y.data += (f[i].first + it.tile[i].begin * a[i].phases) * whole.axis[i];
          y.axis[i] *= a[i].phases;
        }
        run_phase(it, f, panel, bias, y);
      }
}

inline int64_t thread_bytes(const Plan& p) {
  int64_t each = aligned(p.window * 2) + aligned(p.lines * 2) + aligned(p.steps * int64_t(sizeof(Step)));
  each += aligned(4 * kRows * kOutputs * 4);
  for (int a = 0; a < kAxes; ++a) each += aligned(p.index[a] * 8);
  return each;
}

inline int64_t panel_elements(const Plan& p) { return p.pairs * p.blocks * p.taps * kStepWeights; }

// Whether sums of whole lines may go past the caches, to memory.
inline bool streams(const Plan& p, const Joined<bfloat16>& y) {
  int64_t outputs = p.N * p.K * p.axis[kD].out * p.axis[kH].out * p.axis[kW].out;
  bool lines = y.last() && p.K % kOutputs == 0 && outputs * int64_t(sizeof(bfloat16)) >= kStreamBytes;
  for (int i = 0; i < y.count; ++i) lines = lines && (reinterpret_cast<uintptr_t>(y.part[i].data) & 63) == 0;
  return lines;
}

inline void correlate(const Plan& p, const Joined<bfloat16>& x, const bfloat16* w, const bfloat16* b,
                      const Joined<bfloat16>& y, const Slots& slots, char* scratch, int threads) {
  bfloat16* panel = take<bfloat16>(scratch, panel_elements(p));
  float* bias = take<float>(scratch, p.pairs * kOutputs);
  uint16_t* columns = take<uint16_t>(scratch, column_elements(p) * threads);
  if (p.w_float) pack_weights(p, reinterpret_cast<const float*>(w), panel, columns, column_elements(p), threads);
  else pack_weights(p, w, panel, columns, column_elements(p), threads);
  zero(bias, p.pairs * kOutputs);
  if (b) convert(b, bias, p.K);
  bool stream = streams(p, y);
  int64_t per_thread = thread_bytes(p);
  parallel_for(threads, p.items, [&](int64_t item, int thread) {
    TileState state;
    char* mine = scratch + thread * per_thread;
    bfloat16* window = take<bfloat16>(mine, p.window);
    bfloat16* lines = take<bfloat16>(mine, p.lines);
    Ahead ahead;
    Item it{&p, {}, {}, {}, window, take<Step>(mine, p.steps), take<float>(mine, 4 * kRows * kOutputs), &ahead};
    PackedAxis before{};
    int64_t chunk = item % p.chunks, rest = item / p.chunks, column = rest % (p.tiles[kH] * p.tiles[kW]);
    for (int a = kW; a >= kD; --a) {
      it.packed[a].index = take<int64_t>(mine, p.index[a]);
      if (a == kD) break;
      it.tile[a] = place(p.axis[a], rest % p.tiles[a], p.by_taps[a], it.packed[a]);
      rest /= p.tiles[a];
    }
    int64_t piece = rest % p.pieces, n = rest / p.pieces;
    int64_t first = chunk * p.pairs_per_item, last = min(first + p.pairs_per_item, p.pairs);
    int64_t end = min((piece + 1) * p.slabs_per_item, p.tiles[kD]);
    for (int64_t slab = piece * p.slabs_per_item; slab < end; ++slab) {
      it.tile[kD] = place(p.axis[kD], slab, false, it.packed[kD]);
      Window old = it.steps;
      it.steps = window_steps(it.packed, p.by_taps[kW] ? it.tile[kW].n : it.packed[kW].extent, p.blocks);
      int64_t kept = carry_slices(before, it.packed[kD], it.steps, old, window);
      if (p.in_place) {
        const View<bfloat16>& x0 = x.part[0];
        it.steps = {p.axis[kW].in, 1, x0.axis[kH] / kChannels, 0, x0.axis[kD] / kChannels, 1, p.blocks, p.blocks};
        it.window = target_in(x0, {{it.tile[kD].begin, it.tile[kH].begin, it.tile[kW].begin}, {}}, n, 0).data;
      } else {
        pack_slices(x, n, p.C, it.packed, it.steps, kept, window, lines);
        before = it.packed[kD];
      }
      int64_t next = max<int64_t>(0, before.first + before.extent);
      int64_t slices = min(p.axis[kD].tile * p.axis[kD].in_step, p.axis[kD].in - next);
      ahead = slab + 1 < end && before.dense ? Ahead(x, n, next, max<int64_t>(0, slices), it.packed[kH], p.axis[kW].in)
                                             : Ahead();
      for (int64_t pair = first; pair < last; ++pair) {
        int64_t k = pair * kOutputs;
        for_parts(y, k, kOutputs, [&](const View<bfloat16>& to, int64_t at, int64_t channels, int64_t) {  // one part
          BlockSums<bfloat16> moments;
          Output out{to.data + n * to.n + at * to.c, {to.axis[kD], to.axis[kH], to.axis[kW]}, to.c, channels, stream,
                     slots.data ? &moments : nullptr};
          run_pair(it, panel + pair * p.blocks * p.taps * kStepWeights, bias + k, out);
          if (slots.data) moments.write(slots, n, slab * p.tiles[kH] * p.tiles[kW] + column, k, channels);
        });
      }
    }
    if (stream) _mm_sfence();
  });
}

inline int team(const Plan& p, int threads) {
  double products = double(p.N) * double(p.C) * double(p.K) * double(p.taps);
  for (const Axis& a : p.axis) products *= double(a.count);
  return products < kFewProducts ? 1 : threads;
}

inline int64_t slot_count(const Plan& p) { return p.tiles[kD] * p.tiles[kH] * p.tiles[kW]; }

inline int64_t slots(const ConvGeometry& g) { return g.y_last ? slot_count(make_plan(g, false)) : 0; }

template <bool transposed>
void run(const ConvCall& call) {
  Plan p = make_plan(call.g, transposed);
  Joined<bfloat16> x = join_x<bfloat16>(call), y = join_y<bfloat16>(call);
  correlate(p, transposed ? y : x, static_cast<const bfloat16*>(call.w), static_cast<const bfloat16*>(call.b),
            transposed ? x : y, {call.moments, slot_count(p), call.g.K}, static_cast<char*>(call.scratch),
            team(p, call.threads));
}

template <bool transposed>
int64_t scratch(const ConvGeometry& g, int threads) {
  Plan p = make_plan(g, transposed);
  return aligned(panel_elements(p) * 2) + aligned(p.pairs * kOutputs * 4) + aligned(column_elements(p) * threads * 2) +
         thread_bytes(p) * threads;
}

constexpr ConvCorrelate kTiles = {run<false>, run<true>, scratch<false>, scratch<true>, slots};

#else

constexpr ConvCorrelate kTiles = {};

#endif

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_amx[kDTypes] = {{}, kTiles, {}};
}

}  // namespace convoxel
