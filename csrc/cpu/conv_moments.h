// Moments of a convolution's output, taken from each item's part of it while that is in registers or in the cache:
// count, mean and sum of squared deviations of every channel, into a slot of the item's own. moments.cpp makes one of
// all slots.
#pragma once
#include "conv_tile.h"

namespace convoxel {
namespace {

constexpr int64_t kFirstPixels = 16;
constexpr int64_t kMomentPixels = 128;  // of one chain of sums in the compute type: 4e-7 of error at most in float

// The slots [N][of an image][count, mean, squares][K]; nullptr: nobody asks.
struct Slots {
  double* data;
  int64_t of_image, K;
};

// Sums of d = y - shift and of d d over the pixels of a block of channels, in chains. The shift is the first output; as
// often as the count doubles it becomes the mean so far: sums and squares hardly cancel then, whatever the mean is and
// whatever the first output was.
template <class S>
struct BlockSums {
  typedef Compute<S> A;
  static constexpr int64_t kWidth = kTileVectors * kLanes<A>;
  alignas(64) A shift[kWidth] = {}, s[kWidth] = {}, q[kWidth] = {};
  alignas(64) double sum[kWidth] = {}, squares[kWidth] = {};
  int64_t chain = 0, count = 0, shifted = 0;  // pixels; shifted: when the shift was chosen

  bool empty() const { return chain + count == 0; }

  // Of a pixel, the vector at channel k.
  void start(int64_t k, Vec<A> y) {
    Vec<A> zero{};
    store(shift + k, y - y == zero ? y : zero);
  }
  void add(int64_t k, Vec<A> y) {
    Vec<A> d = y - load(shift + k);
    store(s + k, load(s + k) + d);
    store(q + k, load(q + k) + d * d);
  }
  // Pixels until the chain ends.
  int64_t room() const { return (count < kMomentPixels ? max(kFirstPixels, count) : kMomentPixels) - chain; }
  // n pixels have been added.
  void passed(int64_t n) {
    chain += n;
    if (room() <= 0) end_chain();
  }
  __attribute__((noinline)) void end_chain() {
    for (int64_t i = 0; i < kWidth; ++i) sum[i] += double(s[i]), squares[i] += double(q[i]), s[i] = q[i] = 0;
    count += chain, chain = 0;
    if (count < 2 * shifted) return;
    shifted = count;
    double n = double(count);
    for (int64_t i = 0; i < kWidth; ++i) {
      A mean = A(double(shift[i]) + sum[i] / n);
      if (mean - mean != 0) continue;
      double move = double(mean) - double(shift[i]);
      squares[i] += move * (n * move - 2 * sum[i]), sum[i] -= n * move, shift[i] = mean;
    }
  }
  // `channels` channels into the slot, from channel k on.
  void write(const Slots& slots, int64_t n, int64_t slot, int64_t k, int64_t channels) {
    if (chain) end_chain();
    double *to = slots.data + (n * slots.of_image + slot) * 3 * slots.K + k, all = double(count);
    for (int64_t i = 0; i < channels; ++i) {
      double m2 = squares[i] - sum[i] * sum[i] / all;
      to[i] = all, to[slots.K + i] = double(shift[i]) + sum[i] / all, to[2 * slots.K + i] = m2 < 0 ? 0 : m2;
    }
  }
};

// V vectors of channels of n pixels, `step` apart; `tail` lanes of the last. R: what p holds, S: what it is stored as.
template <class S, int V, class R>
inline void add_pixels(const R* p, int64_t step, int64_t n, int tail, BlockSums<S>& sums) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  Vec<A> m[V], s[V], q[V];
  auto get = [&](const R* at, int v) {
    return as_stored<S>(v < V - 1 || tail == L ? load(at + v * L) : load(at + v * L, tail));
  };
  if (sums.empty())
    for (int v = 0; v < V; ++v) sums.start(v * L, get(p, v));
  for (int v = 0; v < V; ++v) m[v] = load(sums.shift + v * L), s[v] = load(sums.s + v * L), q[v] = load(sums.q + v * L);
  for (int64_t i = 0; i < n; ++i, p += step)
    for (int v = 0; v < V; ++v) {
      Vec<A> d = get(p, v) - m[v];
      s[v] += d;
      q[v] += d * d;
    }
  for (int v = 0; v < V; ++v) store(sums.s + v * L, s[v]), store(sums.q + v * L, q[v]);
  sums.passed(n);
}

// A box of `channels` channels, from channel k on, into its slot.
template <class S, class R>
void gather_moments(const Target<R>& box, const int64_t* size, const Slots& slots, int64_t n, int64_t slot, int64_t k,
                    int64_t channels) {
  constexpr int64_t width = BlockSums<S>::kWidth, L = kLanes<Compute<S>>;
  for (int64_t c = 0; c < channels; c += width) {
    int64_t used = min(width, channels - c);
    int vectors = int(ceil_div(used, L)), tail = int(used - (vectors - 1) * L);
    BlockSums<S> sums;
    with_vectors(vectors, [&](auto V) {
      for (int64_t d = 0; d < size[kD]; ++d)
        for (int64_t h = 0; h < size[kH]; ++h)
          for (int64_t w = 0; w < size[kW];) {
            int64_t some = min(size[kW] - w, sums.room());
            const R* p = box.data + c + d * box.axis[kD] + h * box.axis[kH] + w * box.axis[kW];
            add_pixels<S, V()>(p, box.axis[kW], some, tail, sums);
            w += some;
          }
    });
    sums.write(slots, n, slot, k + c, used);
  }
}

}  // namespace
}  // namespace convoxel
