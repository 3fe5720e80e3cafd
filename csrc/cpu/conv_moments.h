// Moments of a convolution's output, taken from each item's part of it while that is in the cache: count, mean and sum
// of squared deviations of every channel, into a slot of the item's own. moments.cpp makes one of all slots.
#pragma once
#include "conv_tile.h"

namespace convoxel {
namespace {

constexpr int64_t kMomentPixels = 128;  // of one chain of sums in the compute type: 4e-7 of error at most in float

// What is left of v once it is stored as S.
template <class S, class V>
inline V as_stored(V v) {
  if constexpr (std::is_same<S, bfloat16>::value) return widen(narrow(v));
  else return v;
}

template <class R>
inline auto load_some(const R* p, int n) {
  return n == kLanes<Compute<R>> ? load(p) : load(p, n);
}

template <class A>
inline void add_lanes(Vec<A> v, double* total) {
  for (int i = 0; i < kLanes<A>; ++i) total[i] += double(v[i]);
}

// Sums over the first `most` pixels of a box of d = y - shift and of d d, in chains, of V vectors of channels; `tail`
// lanes of the last. R: what the box holds, S: what it is stored as.
template <class S, int V, class R>
void sum_box(const Target<R>& box, const int64_t* size, int64_t most, int tail, const Compute<S>* shift, double* sum,
             double* squares) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  Vec<A> m[V], s[V] = {}, q[V] = {};
  for (int v = 0; v < V; ++v) m[v] = load(shift + v * L);
  int64_t chain = 0;
  auto end_chain = [&] {
    for (int v = 0; v < V; ++v) {
      add_lanes<A>(s[v], sum + v * L), add_lanes<A>(q[v], squares + v * L);
      s[v] = q[v] = Vec<A>{};
    }
    chain = 0;
  };
  auto add_pixels = [&](const R* p, int64_t n, int lanes) {
    for (int64_t i = 0; i < n; ++i, p += box.axis[kW])
      for (int v = 0; v < V; ++v) {
        Vec<A> y = v < V - 1 ? load(p + v * L) : load_some(p + v * L, lanes), d = as_stored<S>(y) - m[v];
        s[v] += d;
        q[v] += d * d;
      }
  };
  for (int64_t d = 0; d < size[kD]; ++d)
    for (int64_t h = 0; h < size[kH]; ++h)
      for (int64_t w = 0; w < size[kW] && most > 0;) {
        int64_t n = min(min(size[kW] - w, kMomentPixels - chain), most);
        const R* p = box.data + d * box.axis[kD] + h * box.axis[kH] + w * box.axis[kW];
        if (tail == L) add_pixels(p, n, L);
        else add_pixels(p, n, tail);
        w += n, chain += n, most -= n;
        if (chain == kMomentPixels) end_chain();
      }
  end_chain();
}

// The slots [N][of an image][count, mean, squares][K]; nullptr: nobody asks.
struct Slots {
  double* data;
  int64_t of_image, K;
};

// A box of `channels` channels, from channel k on, into its slot. Squares are of deviations from the mean of the first
// pixels: sums and squares then cancel by a factor of all over first at most, whatever the mean is.
template <class S, class R>
void gather_moments(const Target<R>& box, const int64_t* size, const Slots& slots, int64_t n, int64_t slot, int64_t k,
                    int64_t channels) {
  typedef Compute<S> A;
  constexpr int64_t width = kTileVectors * kLanes<A>;
  int64_t count = size[kD] * size[kH] * size[kW], first = min(count, kMomentPixels);
  for (int64_t c = 0; c < channels; c += width) {
    int64_t used = min(width, channels - c);
    int vectors = int(ceil_div(used, kLanes<A>)), tail = int(used - (vectors - 1) * kLanes<A>);
    alignas(64) A shift[width] = {};
    alignas(64) double sum[width] = {}, squares[width] = {};
    Target<R> part{box.data + c, {box.axis[kD], box.axis[kH], box.axis[kW]}};
    with_vectors(vectors, [&](auto V) {
      sum_box<S, V()>(part, size, first, tail, shift, sum, squares);
      for (int64_t i = 0; i < used; ++i) {
        A mean = A(sum[i] / double(first));
        shift[i] = mean - mean == 0 ? mean : 0;
      }
      zero(sum, width), zero(squares, width);
      sum_box<S, V()>(part, size, count, tail, shift, sum, squares);
    });
    double* to = slots.data + (n * slots.of_image + slot) * 3 * slots.K + k + c;
    for (int64_t i = 0; i < used; ++i) {
      double q = squares[i] - sum[i] * sum[i] / double(count);
      to[i] = double(count), to[slots.K + i] = double(shift[i]) + sum[i] / double(count);
      to[2 * slots.K + i] = q < 0 ? 0 : q;
    }
  }
}

}  // namespace
}  // namespace convoxel
