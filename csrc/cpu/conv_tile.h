// What the direct convolutions share: views of torch's two layouts, and the packing of a window
// of x into a padded channels-last tile of the compute type. After it no loop knows padding,
// layout or storage type; the copy costs 1 to 3 % of the arithmetic that follows.
#pragma once
#include "conv_axis.h"
#include "transpose.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace convoxel {
namespace {

constexpr int64_t kTileBytes = 512 * 1024;  // of packed x: half of a Zen 4 L2, the rest is weights
constexpr int64_t kPassProducts = 144;      // of one chain of sums: short for accuracy, 18 KB of weights for L1
constexpr int64_t kPassPixels = 112;        // that a pass goes over: a few register tiles
constexpr int64_t kBlockProducts = 384;     // of a block of input channels with the taps of the H, W plane
constexpr int64_t kMinItems = 64;           // cut work at least this fine, for machines of 32 threads

// Steps, in elements, of a tensor [N, C, D, H, W] in either layout.
template <class S>
struct View {
  S* data;
  int64_t n, c, axis[kAxes];
};

template <class S>
inline View<S> view(void* data, int64_t C, int64_t D, int64_t H, int64_t W, bool last) {
  int64_t volume = D * H * W;
  if (last) return {static_cast<S*>(data), volume * C, 1, {H * W * C, W * C, C}};
  return {static_cast<S*>(data), volume * C, volume, {H * W, W, 1}};
}
template <class S>
inline View<S> view_x(const ConvCall& call) {
  const ConvAxis* a = call.g.axis;
  return view<S>(call.x[0], call.g.C, a[kD].in, a[kH].in, a[kW].in, call.g.x_last);
}
template <class S>
inline View<S> view_y(const ConvCall& call) {
  const ConvAxis* a = call.g.axis;
  return view<S>(call.y, call.g.K, a[kD].out, a[kH].out, a[kW].out, call.g.y_last);
}

// A tensor whose channels lie in several, side by side, or in one: a convolution reads and writes the parts of a
// concatenation where they are.
template <class S>
struct Joined {
  View<S> part[kMostParts];
  int64_t end[kMostParts];  // channels up to that of each part
  int count;

  bool one() const { return count == 1; }
  bool last() const { return part[0].c == 1; }
};

template <class S>
inline Joined<S> join_x(const ConvCall& call) {
  const ConvAxis* a = call.g.axis;
  Joined<S> x{};
  for (int64_t end = 0; x.count < kMostParts && call.g.parts[x.count]; ++x.count) {
    int64_t channels = call.g.parts[x.count];
    x.part[x.count] = view<S>(call.x[x.count], channels, a[kD].in, a[kH].in, a[kW].in, call.g.x_last);
    x.end[x.count] = end += channels;
  }
  return x;
}
template <class S>
inline Joined<S> join_y(const ConvCall& call) {
  return {{view_y<S>(call)}, {call.g.K}, 1};
}

// f(part, its channel, how many, where they begin among the `channels` from c on), of each part that has some of them.
template <class S, class F>
inline void for_parts(const Joined<S>& x, int64_t c, int64_t channels, const F& f) {
  for (int i = 0; i < x.count; ++i) {
    int64_t first = i ? x.end[i - 1] : 0, begin = max(c, first), end = min(c + channels, x.end[i]);
    if (begin < end) f(x.part[i], begin - first, end - begin, begin - c);
  }
}

// A 1x1x1 convolution knows no axes: the voxels of an image, of all images where both tensors are channels-last, are
// one row.
inline ConvCall flattened(ConvCall call) {
  ConvGeometry& g = call.g;
  int64_t voxels = 1;
  for (const ConvAxis& a : g.axis) {
    if (a.kernel != 1 || a.stride != 1 || a.padding != 0) return call;
    voxels *= a.in;
  }
  if (g.x_last && g.y_last) voxels *= g.N, g.N = 1;
  g.axis[kD] = g.axis[kH] = {1, 1, 1, 1, 0, 1};
  g.axis[kW] = {voxels, voxels, 1, 1, 0, 1};
  return call;
}

template <class A>
inline void zero(A* p, int64_t n) {
  __builtin_memset(p, 0, size_t(n) * sizeof(A));
}

template <class S, class R>
inline void convert(const S* src, R* dst, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, int(n - i)), int(n - i));
}

// What is left of v once it is stored as S.
template <class S, class V>
inline V as_stored(V v) {
  if constexpr (std::is_same<S, bfloat16>::value) return widen(narrow(v));
  else return v;
}

template <class A>
inline void zero_pixels(A* p, int64_t pixels, int64_t channels, int64_t step) {
  if (channels == step) return zero(p, pixels * channels);
  for (int64_t i = 0; i < pixels; ++i) zero(p + i * step, channels);
}

// One row along W: `channels` channels of tile [extent], `step` from one position to the next, from x at `row`.
template <class S, class A>
inline void pack_row(const S* row, const View<S>& x, const PackedAxis& w, int64_t channels, A* tile, int64_t step) {
  if (!w.dense) {
    for (int64_t i = 0; i < w.extent; ++i, tile += step) {
      if (w.index[i] < 0) zero(tile, channels);
      else if (x.c == 1) convert(row + w.index[i] * x.axis[kW], tile, channels);
      else
        for (int64_t c = 0; c < channels; ++c) tile[c] = to_compute(row[w.index[i] * x.axis[kW] + c * x.c]);
    }
    return;
  }
  int64_t left = min(w.extent, max<int64_t>(0, -w.first));
  int64_t run = max<int64_t>(0, min(w.extent, w.size - w.first) - left);
  zero_pixels(tile, left, channels, step);
  const S* src = row + (w.first + left) * x.axis[kW];
  A* dst = tile + left * step;
  if (x.c != 1) transpose(src, x.c, dst, step, channels, run);
  else if (x.axis[kW] == channels && step == channels) convert(src, dst, run * channels);
  else
    for (int64_t i = 0; i < run; ++i) convert(src + i * x.axis[kW], dst + i * step, channels);
  zero_pixels(dst + run * step, w.extent - left - run, channels, step);
}

// tile [D, H, W, channels] of the packed extents, from x at image n and its first channel c.
template <class S, class A>
inline void pack_window(const Joined<S>& x, int64_t n, int64_t c, const PackedAxis* p, int64_t channels, A* tile) {
  for_parts(x, c, channels, [&](const View<S>& part, int64_t at, int64_t some, int64_t from) {
    A* row = tile + from;
    for (int64_t d = 0; d < p[kD].extent; ++d)
      for (int64_t h = 0; h < p[kH].extent; ++h, row += p[kW].extent * channels) {
        int64_t id = p[kD].index[d], ih = p[kH].index[h];
        if (id < 0 || ih < 0) {
          zero_pixels(row, p[kW].extent, some, channels);
          continue;
        }
        const S* from_x = part.data + n * part.n + at * part.c + id * part.axis[kD] + ih * part.axis[kH];
        pack_row(from_x, part, p[kW], some, row, channels);
      }
  });
}

// Whether a window is a part of a channels-last x as it lies, and where that begins.
inline bool lies_in_x(const PackedAxis* p) {
  for (int a = 0; a < kAxes; ++a)
    if (!p[a].dense || p[a].first < 0 || p[a].first + p[a].extent > p[a].size) return false;
  return true;
}
template <class S>
inline const S* window_in(const View<S>& x, int64_t n, int64_t c, const PackedAxis* p) {
  const S* at = x.data + n * x.n + c;
  for (int a = 0; a < kAxes; ++a) at += p[a].first * x.axis[a];
  return at;
}

// Input channels of a block: a chain of sums is one block times the taps of the H, W plane.
inline int64_t channel_block(int64_t channels, int64_t plane_taps) {
  int64_t most = max<int64_t>(16, kBlockProducts / plane_taps);
  return ceil_div(channels, ceil_div(channels, most));
}

// Scratch is handed out in cache lines; a sanitized build leaves one behind each piece that nothing may touch.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kRedZone = 64;
#else
constexpr int64_t kRedZone = 0;
#endif

inline int64_t aligned(int64_t bytes) { return round_up(bytes, 64) + kRedZone; }

template <class T>
inline T* take(char*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += aligned(count * int64_t(sizeof(T)));
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(p, scratch - kRedZone - reinterpret_cast<char*>(p));
  __asan_poison_memory_region(scratch - kRedZone, kRedZone);
#endif
  return p;
}

// A parallel region costs 10 us and more; 4 MFLOP take one core 20 us.
inline int team(const ConvGeometry& g, int threads) {
  double flops = 2.0 * double(g.N) * double(g.C) * double(g.K) / double(g.groups);
  for (const ConvAxis& a : g.axis) flops *= double(a.out) * double(a.kernel);
  return flops < 4e6 ? 1 : threads;
}

// Output channels go in blocks of `most` vectors; a last block may have fewer.
template <class A>
struct ChannelBlocks {
  int64_t channels, width, count;
  explicit ChannelBlocks(int64_t channels, int most = kTileVectors)
      : channels(channels), width(most * kLanes<A>), count(ceil_div(channels, width)) {}
  int64_t used(int64_t i) const { return min(width, channels - i * width); }
  int vectors(int64_t i) const { return int(ceil_div(used(i), kLanes<A>)); }
  int tail(int64_t i) const { return int(used(i) - (vectors(i) - 1) * kLanes<A>); }
  int64_t padded_width(int64_t i) const { return vectors(i) * kLanes<A>; }
  int64_t padded() const { return (count - 1) * width + padded_width(count - 1); }
};

// Calls f with the tile's width as a compile-time number.
template <int V = kTileVectors, class F>
inline void with_vectors(int vectors, const F& f) {
  if constexpr (V > 1) {
    if (vectors < V) return with_vectors<V - 1>(vectors, f);
  }
  f(std::integral_constant<int, V>{});
}

template <class A>
struct Target {  // where a tile's sums go: the output itself, or scratch that is flushed afterwards
  A* data;
  int64_t axis[kAxes];  // step per output position
};

// What a tile covers of the output: begin and size along each axis.
struct Box {
  int64_t begin[kAxes], size[kAxes];
};

// Where an item's tile lies in y itself, from channel k of image n.
template <class A>
inline Target<A> target_in(const View<A>& y, const Box& box, int64_t n, int64_t k) {
  Target<A> t{y.data + n * y.n + k, {y.axis[kD], y.axis[kH], y.axis[kW]}};
  for (int a = 0; a < kAxes; ++a) t.data += box.begin[a] * y.axis[a];
  return t;
}

// The finished tile [D, H, W, width] of compute type goes to the output's layout and storage type.
template <class S, class A>
void flush(const Target<A>& tile, const View<S>& y, const Box& box, int64_t n, int64_t k, int64_t channels) {
  for (int64_t d = 0; d < box.size[kD]; ++d)
    for (int64_t h = 0; h < box.size[kH]; ++h) {
      const A* src = tile.data + d * tile.axis[kD] + h * tile.axis[kH];
      S* dst = y.data + n * y.n + k * y.c + (box.begin[kD] + d) * y.axis[kD] + (box.begin[kH] + h) * y.axis[kH] +
               box.begin[kW] * y.axis[kW];
      if (y.c != 1) transpose(src, tile.axis[kW], dst, y.c, box.size[kW], channels);
      else
        for (int64_t i = 0; i < box.size[kW]; ++i) convert(src + i * tile.axis[kW], dst + i * y.axis[kW], channels);
    }
}
template <class S, class A>
void flush(const Target<A>& tile, const Joined<S>& y, const Box& box, int64_t n, int64_t k, int64_t channels) {
  for_parts(y, k, channels, [&](const View<S>& part, int64_t at, int64_t some, int64_t from) {
    flush(Target<A>{tile.data + from, {tile.axis[kD], tile.axis[kH], tile.axis[kW]}}, part, box, n, at, some);
  });
}

}  // namespace
}  // namespace convoxel
