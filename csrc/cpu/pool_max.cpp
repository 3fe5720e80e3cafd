// Maximum pooling: its values, the tap that held each, and what its gradient needs.
//
//   Max    y[o] = max over the window; code[o] = the tap that held it, (kd KH + kh) KW + kw. torch's rule: the
//          first of equals, the last NaN
//   Match  dx[i] = sum of the dy[o] whose code is the tap that o's window has at i: the gradient of Max
//   Pick   y[o] = x at the tap code[o]: the gradient of Match
//
// Match gathers. Where each voxel is in few windows and no vector shares taps (contiguous), or where taps are
// uneven (adaptive), the same sums are scattered instead, an image and a cache line of its channels at a time.
#include <type_traits>

#include "pool_loop.h"
#include "tables.h"

namespace convoxel {
namespace {

struct NoCodes {};

template <class S_, class Code>
struct Max {
  typedef S_ S;
  typedef Compute<S> A;
  static constexpr bool backward = false, runs = true;
  struct State {
    Vec<A> value;
    Mask<A> code;
  };
  const S* x;
  S* y;
  Code* code;

  template <class R>
  void start(State& s, int64_t, int64_t tap, R) const {
    s = {broadcast(A(-__builtin_inf())), all<A>(tap)};
  }
  static void take(State& s, Vec<A> v, Mask<A> code, Mask<A> allowed) {
    Mask<A> better = ((v > s.value) | (v != v)) & allowed;
    s.value = better ? v : s.value;
    s.code = better ? code : s.code;
  }
  template <class R>
  void tap(State& s, int64_t at, int64_t tap, int64_t, R read) const {
    take(s, read(x + at), all<A>(tap), all<A>(-1));
  }
  void run(State& s, int64_t at, int64_t tap, int64_t count) const {
    constexpr int L = kLanes<A>;
    int64_t i = 0;
    for (; i + L <= count; i += L) take(s, load(x + at + i), all<A>(tap + i) + lane_numbers<A>(), all<A>(-1));
    int n = int(count - i);
    if (n) take(s, load(x + at + i, n), all<A>(tap + i) + lane_numbers<A>(), lane_numbers<A>() < all<A>(n));
  }
  void end_row(State&, int64_t) const {}
  void end_slab(State&, int64_t) const {}
  template <class W>
  void finish(State* s, int64_t at, const Place&, W write) const {
    if constexpr (W::one) gather_lanes(*s);
    write(y + at, s);
    if constexpr (!std::is_same<Code, NoCodes>::value) write.template codes<A>(code + at, s->code);
  }
  static void gather_lanes(State& s) {
    for (int i = 1; i < kLanes<A>; ++i) {
      A a = s.value[0], b = s.value[i];
      bool later = s.code[i] > s.code[0], better = b != b ? a == a || later : b > a || (b == a && !later);
      if (better) s.value[0] = b, s.code[0] = s.code[i];
    }
  }
};

template <class S_, class Code>
struct Pick {
  typedef S_ S;
  typedef Compute<S> A;
  static constexpr bool backward = false, runs = false;
  struct State {
    Vec<A> value;
    Mask<A> code;
  };
  const S* x;
  S* y;
  const Code* code;

  template <class R>
  void start(State& s, int64_t at, int64_t, R read) const {
    s = {Vec<A>{}, read.template codes<A>(code + at)};
  }
  template <class R>
  void tap(State& s, int64_t at, int64_t tap, int64_t, R read) const {
    s.value = s.code == all<A>(tap) ? read(x + at) : s.value;
  }
  void end_row(State&, int64_t) const {}
  void end_slab(State&, int64_t) const {}
  template <class W>
  void finish(State* s, int64_t at, const Place&, W write) const {
    write(y + at, s);
  }
};

template <class S_, class Code>
struct Match {
  typedef S_ S;
  typedef Compute<S> A;
  static constexpr bool backward = true, runs = false, same = false;
  struct State {
    Vec<A> value;
  };
  const S* dy;
  S* dx;
  const Code* code;

  template <class R>
  void start(State& s, int64_t, int64_t, R) const {
    s.value = Vec<A>{};
  }
  template <class R>
  void tap(State& s, int64_t at, int64_t tap, int64_t, R read) const {
    Mask<A> hit = read.template codes<A>(code + at) == all<A>(tap);
    s.value += hit ? read(dy + at) : Vec<A>{};
  }
  void end_row(State&, int64_t) const {}
  void end_slab(State&, int64_t) const {}
  template <class W>
  void finish(State* s, int64_t at, const Place&, W write) const {
    write(dx + at, s);
  }
};

template <class F>
void with_codes(const PoolCall& call, const F& f) {
  if (call.wide) f(static_cast<int32_t*>(call.codes));
  else f(static_cast<uint8_t*>(call.codes));
}

template <class S>
void max_pool(const PoolCall& call) {
  Plan p = make_plan(call, false);
  const S* x = static_cast<const S*>(call.x);
  S* y = static_cast<S*>(call.y);
  if (!call.codes) return walk(Max<S, NoCodes>{x, y, nullptr}, p, call.threads);
  with_codes(call, [&](auto* codes) {
    walk(Max<S, typename std::remove_pointer<decltype(codes)>::type>{x, y, codes}, p, call.threads);
  });
}

template <class S>
void pick(const PoolCall& call) {
  Plan p = make_plan(call, false);
  with_codes(call, [&](auto* codes) {
    typedef typename std::remove_pointer<decltype(codes)>::type Code;
    walk(Pick<S, Code>{static_cast<const S*>(call.x), static_cast<S*>(call.y), codes}, p, call.threads);
  });
}

// Adds each dy where its code points, the outputs in rising order. An item is an image and, of its
// channels, a cache line. dx is cleared just ahead, a slab of D at a time, while it stays in the cache.
template <class S, class Code>
void scatter(const PoolCall& call, const Code* codes) {
  Plan p = make_plan(call, false);
  const S* dy = static_cast<const S*>(call.y);
  S* dx = static_cast<S*>(call.x);
  constexpr int64_t line = 64 / sizeof(S), kCodes = 256;
  const int64_t parts = ceil_div(p.inner, line), voxels = p.source_group / p.inner, slab = p.source_at[kD] / p.inner;
  const int64_t step[kAxes] = {p.windows[kD].source_step * slab, p.windows[kH].source_step * call.axis[kW].in,
                               p.windows[kW].source_step};
  auto offset = [&](int64_t code) {  // of a tap, in voxels from its window's first one
    return code / p.tap_at[kD] * step[kD] + code / p.tap_at[kH] % call.axis[kH].kernel * step[kH] +
           code % call.axis[kW].kernel * step[kW];
  };
  int64_t offsets[kCodes];
  for (int64_t code = 0; code < kCodes; ++code) offsets[code] = offset(code);
  int64_t* starts = sizes<int64_t>(call, kW);
  for (int64_t o = 0; o < p.dest[kW]; ++o) {
    const Window& w = p.windows[kW].at[o];
    starts[o] = w.count ? w.source - w.tap * step[kW] : -(int64_t(1) << 62);
  }
  parallel_for(call.threads, p.groups * parts, [&](int64_t item, int) {
    int64_t group = item / parts, begin = item % parts * line, n = min(line, p.inner - begin), cleared = 0;
    S* to = dx + group * p.source_group + begin;
    auto clear = [&](int64_t end) {
      if (p.inner == 1) __builtin_memset(to + cleared, 0, size_t(max<int64_t>(0, end - cleared)) * sizeof(S));
      else
        for (int64_t v = cleared; v < end; ++v) __builtin_memset(to + v * p.inner, 0, size_t(n) * sizeof(S));
      cleared = max(cleared, end);
    };
    auto add = [&](int64_t at, int64_t start, int64_t c) {
      int64_t code = codes[at], v = start + (sizeof(Code) == 1 ? offsets[code] : offset(code));
      if (uint64_t(v) >= uint64_t(voxels)) return;  // an empty window, or a code that max_pool did not give
      S& sum = to[v * p.inner + c];
      from_compute(to_compute(sum) + to_compute(dy[at]), sum);
    };
    for (int64_t row = 0; row < p.dest[kD] * p.dest[kH]; ++row) {
      const Window &d = p.windows[kD].at[row / p.dest[kH]], &h = p.windows[kH].at[row % p.dest[kH]];
      clear(min(call.axis[kD].in, d.source + d.count * p.windows[kD].source_step) * slab);
      if (!d.count || !h.count) continue;
      int64_t start = d.source * slab - d.tap * step[kD] + h.source * call.axis[kW].in - h.tap * step[kH];
      int64_t at = group * p.dest_group + row * p.dest_at[kH] + begin;
      if (p.inner == 1)
        for (int64_t o = 0; o < p.dest[kW]; ++o) add(at + o, start + starts[o], 0);
      else
        for (int64_t o = 0; o < p.dest[kW]; ++o, at += p.inner)
          for (int64_t c = 0; c < n; ++c) add(at + c, start + starts[o], c);
    }
    clear(voxels);
  });
}

// The scatter adds in the storage type: bfloat16 takes it only where no two windows meet.
template <class S>
bool scatters(const PoolCall& call) {
  if (call.adaptive) return true;
  if (call.last && call.C > 1) return false;
  bool meet = false;
  for (const ConvAxis& a : call.axis) meet |= (a.kernel - 1) * a.dilation >= a.stride && a.out > 1;
  return std::is_same<S, Compute<S>>::value || !meet;
}

template <class S>
void max_input_grad(const PoolCall& call) {
  with_codes(call, [&](auto* codes) {
    typedef typename std::remove_pointer<decltype(codes)>::type Code;
    if (scatters<S>(call)) return scatter<S, Code>(call, codes);
    Plan p = make_plan(call, true);
    walk(Match<S, Code>{static_cast<const S*>(call.y), static_cast<S*>(call.x), codes}, p, call.threads);
  });
}

// torch's indices, in the plane D H W of the input, into y (int64).
template <class Code>
void write_indices(const PoolCall& call, const Code* codes) {
  Plan p = make_plan(call, false);
  int64_t* indices = static_cast<int64_t*>(call.y);
  parallel_for(call.threads, p.rows, [&](int64_t row, int) {
    Place o{{row / p.dest[kH] % p.dest[kD], row % p.dest[kH], 0}};
    for (int64_t at = row * p.dest_at[kH]; at < (row + 1) * p.dest_at[kH]; ++at) {
      o.axis[kW] = at / p.inner % p.dest[kW];
      int64_t index = 0;
      for (int a = 0; a < kAxes; ++a) {
        const ConvAxis& axis = call.axis[a];
        const Window& w = p.windows[a].at[o.axis[a]];
        int64_t tap = codes[at] / p.tap_at[a] % axis.kernel - w.tap;
        index = index * axis.in + w.source + tap * p.windows[a].source_step;
      }
      indices[at] = index;
    }
  });
}

void max_indices(const PoolCall& call) {
  with_codes(call, [&](auto* codes) { write_indices(call, codes); });
}

template <class S>
constexpr MaxPool entries() {
  return {max_pool<S>, max_input_grad<S>, pick<S>, max_indices, scratch_bytes};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const MaxPool max_pool[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
