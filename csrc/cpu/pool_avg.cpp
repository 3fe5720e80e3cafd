// Average pooling and its gradient.
//
//   forward   y[o] = sum of x over o's window / its size
//   backward  dx[i] = sum of dy[o] / size over the windows o that hold i
#include "pool_loop.h"
#include "tables.h"

namespace convoxel {
namespace {

// Sums in three levels (row, slab, window), so that the mean of a whole scan keeps its digits.
template <class S_, bool backward_>
struct Sum {
  typedef S_ S;
  typedef Compute<S> A;
  static constexpr bool backward = backward_, runs = !backward_, same = backward_;
  struct State {
    Vec<A> value, slab, row;
  };
  const S* x;
  S* y;
  const A* size[kAxes];  // Average: of each output's window; Spread: its inverse

  template <class R>
  void start(State& s, int64_t, int64_t, R) const {
    s = {Vec<A>{}, Vec<A>{}, Vec<A>{}};
  }
  template <class R>
  void tap(State& s, int64_t at, int64_t, int64_t w, R read) const {
    if constexpr (backward) s.row += read(x + at) * read.weight(size[kW] + w);
    else s.row += read(x + at);
  }
  void run(State& s, int64_t at, int64_t, int64_t count) const {
    constexpr int64_t L = kLanes<A>, block = 256 * L;
    int64_t i = 0;
    while (count - i >= 4 * L) {  // sums of at most 256 in each of four vectors
      Vec<A> sums[4] = {};
      for (int64_t end = min(count, i + 4 * block); i + 4 * L <= end; i += 4 * L)
        for (int v = 0; v < 4; ++v) sums[v] += load(x + at + i + v * L);
      s.row += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    for (; i + L <= count; i += L) s.row += load(x + at + i);
    if (i < count) s.row += load(x + at + i, int(count - i));
  }
  void end_row(State& s, int64_t h) const {
    s.slab += backward ? s.row * size[kH][h] : s.row;
    s.row = Vec<A>{};
  }
  void end_slab(State& s, int64_t d) const {
    s.value += backward ? s.slab * size[kD][d] : s.slab;
    s.slab = Vec<A>{};
  }
  template <class W>
  void finish(State* s, int64_t at, const Place& o, W write) const {
    if constexpr (!backward) {
      if constexpr (W::one)
        for (int i = 1; i < kLanes<A>; ++i) s->value[0] += s->value[i];
      s->value /= size[kD][o.axis[kD]] * size[kH][o.axis[kH]] * size[kW][o.axis[kW]];
    }
    write(y + at, s);
  }
};

// The number of voxels in o's window as torch counts it: with padding, up to its far edge.
inline int64_t window_size(const PoolCall& call, int a, int64_t o) {
  const ConvAxis& axis = call.axis[a];
  if (call.divisor) return a == kD ? call.divisor : 1;
  if (call.adaptive) return adaptive_window(axis.in, axis.out, o).count;
  int64_t start = o * axis.stride - axis.padding;
  if (!call.count_padding) return forward_window(axis, o).count;
  return min(start + axis.kernel, axis.in + axis.padding) - start;
}

template <class S, bool backward>
void average(const PoolCall& call) {
  typedef Compute<S> A;
  Plan p = make_plan(call, backward);
  Sum<S, backward> op{
      static_cast<const S*>(backward ? call.y : call.x), static_cast<S*>(backward ? call.x : call.y), {}};
  for (int a = 0; a < kAxes; ++a) {
    A* size = sizes<A>(call, a);
    for (int64_t o = 0; o < call.axis[a].out; ++o) {
      A n = A(window_size(call, a, o));
      size[o] = backward ? 1 / n : n;
    }
    op.size[a] = size;
  }
  walk(op, p, call.threads);
}

template <class S>
constexpr AvgPool entries() {
  return {average<S, false>, average<S, true>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const AvgPool avg_pool[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
