// Convolutions over so few voxels that the weights are most of the work (the deep layers of a network, linear layers
// of small batches): w [K, C * taps] is read where it lies, once, as one factor of a matrix product. The other is
// columns of x: for each output voxel its C * taps inputs.
#pragma once
#include "conv_weights.h"
#include "gemm.h"

namespace convoxel {
namespace {

constexpr int64_t kRowsPerItem = 28;  // output channels that share a walk over the columns
constexpr int64_t kChain = 160;       // products of one chain of sums

struct Columns {
  int64_t N, groups, C, K, taps;  // C and K of a group
  int64_t in, out, pixels;        // voxels of an image of x and of y; of all images of y
  int64_t J;                      // C * taps: what one output sums over
  int64_t plane;                  // of one channel of x: all images, and one place for what lies outside
  bool w_last, w_float;           // as ConvGeometry has them

  // Where an output's product with tap t of channel c comes among J, of some channels: in the order of w.
  int64_t row(int64_t c, int64_t t, int64_t channels) const { return w_last ? t * channels + c : c * taps + t; }
};

inline Columns make_columns(const ConvGeometry& g) {
  Columns p{g.N, g.groups, g.C / g.groups, g.K / g.groups, 1, 1, 1, 0, 0, 0, g.w_last, g.w_float};
  for (const ConvAxis& a : g.axis) p.taps *= a.kernel, p.in *= a.in, p.out *= a.out;
  p.pixels = p.N * p.out, p.J = p.C * p.taps, p.plane = p.N * p.in + 1;
  return p;
}

// index[tap * tap_step + pixel * pixel_step]: the place in a plane that a tap of an output voxel reads. 32 bits, for
// the gathers: the route keeps planes smaller.
inline void fill_index(const ConvGeometry& g, const Columns& p, int64_t tap_step, int64_t pixel_step, int32_t* index,
                       int threads) {
  const ConvAxis *d = &g.axis[kD], *h = &g.axis[kH], *w = &g.axis[kW];
  int64_t kernel = h->kernel * w->kernel;
  parallel_for(p.pixels * p.taps < 16384 ? 1 : threads, ceil_div(p.pixels, 64), [&](int64_t item, int) {
    for (int64_t i = item * 64; i < min(p.pixels, item * 64 + 64); ++i)
      for (int64_t t = 0; t < p.taps; ++t) {
        int64_t id = i / (h->out * w->out) % d->out * d->stride + t / kernel * d->dilation - d->padding;
        int64_t ih = i / w->out % h->out * h->stride + t / w->kernel % h->kernel * h->dilation - h->padding;
        int64_t iw = i % w->out * w->stride + t % w->kernel * w->dilation - w->padding;
        bool inside = id >= 0 && id < d->in && ih >= 0 && ih < h->in && iw >= 0 && iw < w->in;
        int64_t at = i / p.out * p.in + (id * h->in + ih) * w->in + iw;
        index[t * tap_step + i * pixel_step] = int32_t(inside ? at : p.N * p.in);
      }
  });
}

// Channels c .. c + channels of a tensor of `volume` voxels an image, as planes [channel][image][voxel].
template <class S, class A>
void read_planes(const View<S>& x, int64_t N, int64_t volume, int64_t c, int64_t channels, A* planes, int64_t plane) {
  for (int64_t n = 0; n < N; ++n) {
    const S* from = x.data + n * x.n + c * x.c;
    if (x.c == 1) transpose(from, x.axis[kW], planes + n * volume, plane, volume, channels);
    else
      for (int64_t i = 0; i < channels; ++i) convert(from + i * x.c, planes + i * plane + n * volume, volume);
  }
}

// Voxels [begin, end) of all images, from rows [channel][voxel - begin] to a tensor.
template <class S, class A>
void write_rows(const A* rows, int64_t row, int64_t begin, int64_t end, int64_t volume, int64_t c, int64_t channels,
                const View<S>& y) {
  for (int64_t i = begin; i < end;) {
    int64_t n = i / volume, at = i % volume, run = min(end - i, volume - at);
    S* to = y.data + n * y.n + c * y.c + at * y.axis[kW];
    if (y.c == 1) transpose(rows + (i - begin), row, to, y.axis[kW], channels, run);
    else
      for (int64_t k = 0; k < channels; ++k) convert(rows + k * row + (i - begin), to + k * y.c, run);
    i += run;
  }
}

// Channels of x whose taps fill vectors of columns well.
template <class A>
int64_t channels_per_item(const Columns& p) {
  constexpr int64_t width = kTileVectors * kLanes<A>;
  int64_t best = 1;
  auto filled = [&](int64_t c) { return double(c * p.taps) / double(round_up(c * p.taps, width)); };
  for (int64_t c = 1; c <= p.C && c * p.taps <= 4 * width; ++c)
    if (filled(c) >= filled(best)) best = c;
  return best;
}

}  // namespace
}  // namespace convoxel
