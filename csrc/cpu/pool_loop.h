// The loop of every pooling: window by window, tap by tap in rising order. What is done with a tap is an
// operation (pool_max.cpp, pool_avg.cpp):
//
//   S, A             storage and computing type
//   State            what it knows of one vector of destinations
//   backward         whether the destination is the input
//   start tap finish of a window; end_row and end_slab after each of its rows and planes
//   run, runs        taps that lie side by side, taken by all lanes of one window's State
//   same             of backward ones: destinations of the same window are equal, and may be copied
//
// Every result is gathered and written once, so nothing is cleared first and nothing races. Lanes are
// channels in channels-last tensors and voxels along W in contiguous ones, where windows that no vector
// shares (at borders, or adaptive) go one by one.
#pragma once
#include "pool_window.h"

namespace convoxel {
namespace {

constexpr int64_t kItemVoxels = 32768;  // least work of one item, in voxels read or written
constexpr int64_t kMinItems = 64;       // channels are divided too where there are fewer rows than this

// Access to lanes -----------------------------------------------------------------------------------

enum Lanes { kFull, kPart, kOne };  // all lanes, the first n, or one window spread over all of them
enum { kAny = 0 };                  // a step that is known at run time only

template <int step, Lanes lanes, bool voxels>  // lanes are voxels, `step` apart; or channels
struct Read {
  int n;
  int64_t stride;
  static constexpr bool one = lanes == kOne;

  template <class S>
  Vec<Compute<S>> operator()(const S* p) const {
    typedef Compute<S> A;
    constexpr int L = kLanes<A>;
    if constexpr (step == 1) {
      if constexpr (lanes == kFull) return load(p);
      else return load(p, n);
    } else if constexpr (step == 2) {
      if constexpr (lanes == kFull) return even<A>(load(p), load(p + L - 1));
      int used = 2 * n - 1;
      return even<A>(load(p, min(L, used)), used < L ? Vec<A>{} : load(p + L - 1, used - L + 1));
    } else {
      Vec<A> v{};
      for (int i = 0; i < (lanes == kFull ? L : n); ++i) v[i] = to_compute(p[i * stride]);
      return v;
    }
  }
  template <class A, class Code>
  Mask<A> codes(const Code* p) const {
    if constexpr (lanes == kFull) return load_codes<A>(p);
    else return load_codes<A>(p, n);
  }
  template <class A>
  Vec<A> weight(const A* p) const {
    if constexpr (!voxels) return broadcast(*p);
    else return (*this)(p);
  }
};

template <int step, Lanes lanes>
struct Write {
  int n;
  int64_t stride;
  static constexpr bool one = lanes == kOne;
  static constexpr int states = step == 2 ? 2 : 1;  // two, of voxels that alternate

  template <class S, class State>
  void operator()(S* p, const State* s) const {
    typedef Compute<S> A;
    constexpr int L = kLanes<A>;
    if constexpr (step == 1) {
      if constexpr (lanes == kFull) store(p, s->value);
      else store(p, s->value, n);
    } else if constexpr (step == 2) {
      Vec<A> low = zip<A>(s[0].value, s[1].value, 0), high = zip<A>(s[0].value, s[1].value, 1);
      if constexpr (lanes == kFull) return store(p, low), store(p + L, high);
      store(p, low, min(L, 2 * n));
      if (2 * n > L) store(p + L, high, 2 * n - L);
    } else {
      for (int i = 0; i < (lanes == kFull ? L : n); ++i) from_compute(s->value[i], p[i * stride]);
    }
  }
  template <class A, class Code>
  void codes(Code* p, Mask<A> c) const {
    if constexpr (lanes == kFull) store_codes<A>(p, c);
    else store_codes<A>(p, c, n);
  }
};

struct Place {
  int64_t axis[kAxes];
};

// The loop ------------------------------------------------------------------------------------------

struct Plan {
  int64_t groups, inner;  // N images of C channels (channels-last), or N * C images of one
  int64_t dest[kAxes], source_at[kAxes], dest_at[kAxes], source_group, dest_group;  // extents; steps in elements
  int64_t tap_at[kAxes];
  Windows windows[kAxes];
  int64_t stride;  // of windows along W
  int64_t rows, rows_per_item, parts;
};

template <class Op, int V, class R>
inline void window(const Op& op, const Plan& p, const Window* at, int64_t source, int64_t dest, R read,
                   typename Op::State* s) {
  constexpr int L = kLanes<typename Op::A>;
  const Window &d = at[kD], &h = at[kH], &w = at[kW];
  int64_t first = d.tap * p.tap_at[kD] + h.tap * p.tap_at[kH] + w.tap;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) op.start(s[v], dest + v * L, first, read);
  int64_t w_at = p.windows[kW].source_step * p.source_at[kW];
  for (int64_t i = 0; i < d.count; ++i) {
    int64_t sd = d.source + i * p.windows[kD].source_step, td = first + i * p.windows[kD].tap_step * p.tap_at[kD];
    for (int64_t j = 0; j < h.count; ++j) {
      int64_t sh = h.source + j * p.windows[kH].source_step, tap = td + j * p.windows[kH].tap_step * p.tap_at[kH];
      int64_t from = source + sd * p.source_at[kD] + sh * p.source_at[kH] + w.source * p.source_at[kW];
      if constexpr (Op::runs && R::one) {  // lanes share the window: each takes voxels of its own
        int64_t together = w_at == 1 ? w.count : 1;
        for (int64_t k = 0; k < w.count; k += together) op.run(s[0], from + k * w_at, tap + k, together);
      } else {
        for (int64_t k = 0; k < w.count; ++k, from += w_at, tap += p.windows[kW].tap_step)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) op.tap(s[v], from + v * L, tap, w.source + k * p.windows[kW].source_step, read);
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) op.end_row(s[v], sh);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) op.end_slab(s[v], sd);
  }
}

// Channels-last: channels [c, end) of one destination row.
template <class Op>
void channels_row(const Op& op, const Plan& p, Place o, Window* at, int64_t source, int64_t dest, int64_t begin,
                  int64_t end) {
  constexpr int L = kLanes<typename Op::A>;
  for (int64_t& w = o.axis[kW]; w < p.dest[kW]; ++w) {
    at[kW] = p.windows[kW].at[w];
    auto block = [&](auto V, auto lanes, int64_t c, int n) {
      typename Op::State s[V()];
      int64_t to = dest + w * p.inner + c;
      window<Op, V()>(op, p, at, source + c, to, Read<1, lanes(), false>{n, 1}, s);
      for (int v = 0; v < V(); ++v) op.finish(s + v, to + v * L, o, Write<1, lanes()>{n, 1});
    };
    int64_t c = begin;
    for (; c + 2 * L <= end; c += 2 * L)
      block(std::integral_constant<int, 2>{}, std::integral_constant<Lanes, kFull>{}, c, L);
    for (; c + L <= end; c += L) block(std::integral_constant<int, 1>{}, std::integral_constant<Lanes, kFull>{}, c, L);
    if (c < end) block(std::integral_constant<int, 1>{}, std::integral_constant<Lanes, kPart>{}, c, int(end - c));
  }
}

// Contiguous: one destination row. Forward, lanes step along the source; backward, along the destination,
// where the `stride` destinations that share sources are done together.
template <class Op, int step>
void voxels_row(const Op& op, const Plan& p, Place o, Window* at, int64_t source, int64_t dest) {
  constexpr int L = kLanes<typename Op::A>, read_step = Op::backward ? 1 : step, write_step = Op::backward ? step : 1;
  constexpr int states = Write<write_step, kFull>::states;
  const Window* windows = p.windows[kW].at;
  int64_t phases = Op::backward ? p.stride : 1, W = p.dest[kW];
  auto block = [&](auto lanes, int n) {
    for (int64_t r = 0; r < phases; r += states) {
      typename Op::State s[states];
      for (int i = 0; i < states; ++i) {
        at[kW] = windows[o.axis[kW] + r + i];
        window<Op, 1>(op, p, at, source, dest + o.axis[kW], Read<read_step, lanes(), true>{n, p.stride}, s + i);
      }
      op.finish(s, dest + o.axis[kW] + r, o, Write<write_step, lanes()>{n, p.stride});
    }
  };
  auto even = [&](int64_t w) {  // lanes from w on that one block can take
    int64_t n = w >= 0 && w + phases <= W ? L : 1;
    for (int64_t r = 0; r < phases && n > 1; ++r) n = min(n, windows[w + r].run);
    return n;
  };
  for (int64_t& w = o.axis[kW]; w < W;) {
    int64_t n = even(w);
    if (n < L && n > 1 && even(w - (L - n) * phases) == L) w -= (L - n) * phases, n = L;  // some are done again
    if (n == L) block(std::integral_constant<Lanes, kFull>{}, L), w += L * phases;
    else if (n > 1) block(std::integral_constant<Lanes, kPart>{}, int(n)), w += n * phases;
    else {
      typename Op::State s;
      at[kW] = windows[w];
      window<Op, 1>(op, p, at, source, dest + w, Read<1, kOne, true>{1, 1}, &s);
      op.finish(&s, dest + w, o, Write<1, kOne>{1, 1});
      ++w;
      if constexpr (Op::backward) {
        if constexpr (Op::same) {
          typename Op::S value = op.y[dest + w - 1];
          for (int64_t more = windows[w - 1].same - 1; more > 0; --more) op.y[dest + w++] = value;
        }
      }
    }
  }
}

// How far back, in elements, a row with the same windows lies among the `done` rows before o; 0: none.
inline int64_t equal_rows(const Plan& p, const Place& o, int64_t done) {
  const int64_t d = o.axis[kD], h = o.axis[kH];
  if (h && done && equal(p.windows[kH].at[h - 1], p.windows[kH].at[h], 0)) return p.dest_at[kH];
  if (d && done >= p.dest[kH] && equal(p.windows[kD].at[d - 1], p.windows[kD].at[d], 0)) return p.dest_at[kD];
  return 0;
}

template <class Op, int step>
void walk(const Op& op, const Plan& p, int threads) {
  constexpr int64_t L = kLanes<typename Op::A>;
  parallel_for(threads, ceil_div(p.rows, p.rows_per_item) * p.parts, [&](int64_t item, int) {
    int64_t part = item % p.parts, first = item / p.parts * p.rows_per_item;
    int64_t vectors = ceil_div(p.inner, L), begin = vectors * part / p.parts * L;
    int64_t end = min(p.inner, vectors * (part + 1) / p.parts * L);
    for (int64_t row = first; row < min(first + p.rows_per_item, p.rows); ++row) {
      Place o{{row / p.dest[kH] % p.dest[kD], row % p.dest[kH], 0}};
      int64_t group = row / p.dest[kH] / p.dest[kD];
      int64_t source = group * p.source_group;
      int64_t dest = group * p.dest_group + o.axis[kD] * p.dest_at[kD] + o.axis[kH] * p.dest_at[kH];
      Window at[kAxes] = {p.windows[kD].at[o.axis[kD]], p.windows[kH].at[o.axis[kH]], {}};
      if constexpr (Op::backward) {
        if constexpr (Op::same) {  // the row above, or the one before it in D, may be this one already
          int64_t back = p.parts > 1 ? 0 : equal_rows(p, o, row - first);
          if (back) {
            __builtin_memcpy(op.y + dest, op.y + dest - back, size_t(p.dest_at[kH]) * sizeof(typename Op::S));
            continue;
          }
        }
      }
      if (p.inner > 1) channels_row(op, p, o, at, source, dest, begin, end);
      else voxels_row<Op, step>(op, p, o, at, source, dest);
    }
  });
}

template <class Op>
void walk(const Op& op, const Plan& p, int threads) {
  if (p.stride == 1) walk<Op, 1>(op, p, threads);
  else if (p.stride == 2) walk<Op, 2>(op, p, threads);
  else walk<Op, kAny>(op, p, threads);
}

// Calls ---------------------------------------------------------------------------------------------

inline int64_t aligned(int64_t bytes) { return round_up(bytes, 64); }

inline int64_t scratch_bytes(const PoolCall& call) {
  int64_t bytes = 0;
  for (const ConvAxis& a : call.axis) bytes += aligned(max(a.in, a.out) * int64_t(sizeof(Window))) + aligned(a.out * 8);
  return bytes;
}

// One number for each output of an axis, behind the windows in scratch.
template <class T>
T* sizes(const PoolCall& call, int axis) {
  char* scratch = static_cast<char*>(call.scratch);
  for (const ConvAxis& a : call.axis) scratch += aligned(max(a.in, a.out) * int64_t(sizeof(Window)));
  for (int a = 0; a < axis; ++a) scratch += aligned(call.axis[a].out * 8);
  return reinterpret_cast<T*>(scratch);
}

Plan make_plan(const PoolCall& call, bool backward) {
  Plan p{};
  bool last = call.last && call.C > 1;
  p.groups = last ? call.N : call.N * call.C, p.inner = last ? call.C : 1;
  char* scratch = static_cast<char*>(call.scratch);
  int64_t source_at = p.inner, dest_at = p.inner, tap_at = 1;
  for (int a = kW; a >= kD; --a) {
    const ConvAxis& axis = call.axis[a];
    p.dest[a] = backward ? axis.in : axis.out;
    p.source_at[a] = source_at, p.dest_at[a] = dest_at, p.tap_at[a] = tap_at;
    source_at *= backward ? axis.out : axis.in, dest_at *= p.dest[a], tap_at *= axis.kernel;
    Window* at = reinterpret_cast<Window*>(scratch);
    p.windows[a] = (backward ? backward_windows : forward_windows)(axis, call.adaptive, at);
    scratch += aligned(max(axis.in, axis.out) * int64_t(sizeof(Window)));
  }
  const ConvAxis& w = call.axis[kW];
  p.stride = !call.adaptive ? w.stride : w.in % w.out ? 1 : w.in / w.out;
  mark_runs(p.windows[kW].at, p.dest[kW], backward ? p.stride : 1, backward ? 1 : p.stride);
  p.source_group = source_at, p.dest_group = dest_at;
  p.rows = p.groups * p.dest[kD] * p.dest[kH];
  int64_t work = ceil_div(p.groups * max(source_at, dest_at), p.rows);
  p.rows_per_item = max<int64_t>(1, kItemVoxels / work);
  p.parts = p.rows < kMinItems && work > kItemVoxels ? ceil_div(p.inner, 64) : 1;
  return p;
}

}  // namespace
}  // namespace convoxel
