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

// What is done to x where it is read, but not to the zeros around it: act((x - m) a + b), rounded as x is stored.
// constants: [N][m, a, b, slope][C]; nullptr: nothing.
template <class S>
struct Load {
  const Compute<S>* constants = nullptr;
  int64_t C = 0;
  bool relu = false;  // instead of the slope: -inf becomes 0
};

// Steps, in elements, of a tensor [N, C, D, H, W] in either layout.
template <class S>
struct View {
  S* data;
  int64_t n, c, axis[kAxes];
  Load<S> load = {};
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
  View<S> x = view<S>(call.x, call.g.C, a[kD].in, a[kH].in, a[kW].in, call.g.x_last);
  if (call.load) x.load = {static_cast<const Compute<S>*>(call.load->constants), call.g.C, call.load->relu};
  return x;
}
template <class S>
inline View<S> view_y(const ConvCall& call) {
  const ConvAxis* a = call.g.axis;
  return view<S>(call.y, call.g.K, a[kD].out, a[kH].out, a[kW].out, call.g.y_last);
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

// The constants of one image's channels from c on, a line for each kind.
template <class S>
inline Load<S> load_of(const View<S>& x, int64_t n, int64_t c) {
  Load<S> load = x.load;
  if (load.constants) load.constants += n * 4 * load.C + c;
  return load;
}

// V vectors of channels of `pixels` pixels; n lanes of the last vector. The operations are those of norm_act_tile.h:
// same bits.
template <bool relu, int V, class S, class R, class T>
__attribute__((noinline)) void activate_vectors(const Load<S>& load, const R* src, int64_t src_step, T* dst,
                                                int64_t dst_step, int64_t pixels, int n) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  const Vec<A> zero{};
  Vec<A> k[4][V];
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < V; ++v) {
      const A* at = load.constants + i * load.C + v * L;
      k[i][v] = n == L ? convoxel::load(at) : convoxel::load(at, n);
    }
  auto value = [&](Vec<A> x, int v) {
    Vec<A> z = (x - k[0][v]) * k[1][v] + k[2][v];
    if constexpr (relu) return as_stored<S>(z <= zero ? zero : z);
    else return as_stored<S>(z > zero ? z : z * k[3][v]);
  };
  for (int64_t i = 0; i < pixels; ++i, src += src_step, dst += dst_step)
    for (int v = 0; v < V; ++v)
      if (V > 1 || n == L) store(dst + v * L, value(convoxel::load(src + v * L), v));
      else store(dst, value(convoxel::load(src, n), v), n);
}

// Pixels of `channels` channels; src may be dst.
template <class S, class R, class T>
inline void activate(Load<S> load, const R* src, int64_t src_step, T* dst, int64_t dst_step, int64_t pixels,
                     int64_t channels) {
  constexpr int64_t L = kLanes<Compute<S>>;
  for (int64_t c = 0; c < channels;) {
    bool two = channels - c >= 2 * L;
    int n = int(min(L, channels - c));
    auto run = [&](auto relu) {
      if (two) activate_vectors<relu(), 2>(load, src + c, src_step, dst + c, dst_step, pixels, n);
      else activate_vectors<relu(), 1>(load, src + c, src_step, dst + c, dst_step, pixels, n);
    };
    if (load.relu) run(std::true_type{});
    else run(std::false_type{});
    c += two ? 2 * L : n, load.constants += two ? 2 * L : n;
  }
}

// One row along W: tile [extent, channels] from x at `row`.
template <class S, class A>
inline void pack_row(const S* row, const View<S>& x, const PackedAxis& w, const Load<S>& load, int64_t channels,
                     A* tile) {
  if (!w.dense) {
    for (int64_t i = 0; i < w.extent; ++i, tile += channels) {
      if (w.index[i] < 0) zero(tile, channels);
      else if (x.c == 1) convert(row + w.index[i] * x.axis[kW], tile, channels);
      else
        for (int64_t c = 0; c < channels; ++c) tile[c] = to_compute(row[w.index[i] * x.axis[kW] + c * x.c]);
      if (load.constants && w.index[i] >= 0) activate(load, tile, channels, tile, channels, 1, channels);
    }
    return;
  }
  int64_t left = min(w.extent, max<int64_t>(0, -w.first));
  int64_t run = max<int64_t>(0, min(w.extent, w.size - w.first) - left);
  zero(tile, left * channels);
  const S* src = row + (w.first + left) * x.axis[kW];
  A* dst = tile + left * channels;
  if (load.constants && x.c == 1) activate(load, src, x.axis[kW], dst, channels, run, channels);
  else if (x.c != 1) transpose(src, x.c, dst, channels, channels, run);
  else if (x.axis[kW] == channels) convert(src, dst, run * channels);
  else
    for (int64_t i = 0; i < run; ++i) convert(src + i * x.axis[kW], dst + i * channels, channels);
  zero(dst + run * channels, (w.extent - left - run) * channels);
  if (load.constants && x.c != 1) activate(load, dst, channels, dst, channels, run, channels);
}

// tile [D, H, W, channels] of the packed extents, from x at image n and its first channel c.
template <class S, class A>
inline void pack_window(const View<S>& x, int64_t n, int64_t c, const PackedAxis* p, int64_t channels, A* tile) {
  int64_t row = p[kW].extent * channels;
  const Load<S> load = load_of(x, n, c);
  for (int64_t d = 0; d < p[kD].extent; ++d)
    for (int64_t h = 0; h < p[kH].extent; ++h, tile += row) {
      int64_t id = p[kD].index[d], ih = p[kH].index[h];
      if (id < 0 || ih < 0) zero(tile, row);
      else pack_row(x.data + n * x.n + c * x.c + id * x.axis[kD] + ih * x.axis[kH], x, p[kW], load, channels, tile);
    }
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

}  // namespace
}  // namespace convoxel
