// What the depthwise convolutions share: the taps that an output reaches inside the source, rows of taps as
// pointers, and blocks of outputs that the second-level cache holds.
#pragma once
#include "conv_tile.h"
#include "gemm.h"

namespace convoxel {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of source that the rows of a block share
constexpr int64_t kRowBytes = 28 * 1024;     // of source that the taps of a piece of a row read
constexpr int64_t kBlockVectors = 4;         // of channels
constexpr int64_t kRowPositions = 512;       // of a block, along W

template <class A>
inline void in_register(Vec<A>& v) {  // else the compiler loads it again for each use
  asm("" : "+v"(v));
}

// Vectors of channels where they fill at least half of one; else of voxels.
template <class S>
inline bool by_channels(const ConvGeometry& g) {
  return g.x_last && g.y_last && g.C == g.K && 2 * g.C >= kLanes<Compute<S>>;
}

// Along one axis, the taps of position j of a phase that lie inside the source; they step by in_tap and w_tap.
struct Reach {
  int64_t source, weight, count;
};

inline Reach reach(const Axis& a, const Phase& f, int64_t j) {
  auto steps = [&](int64_t n) { return a.in_tap == 1 ? n : ceil_div(n, a.in_tap); };
  int64_t source = j * a.in_step + f.start, first = source < 0 ? steps(-source) : 0;
  source += first * a.in_tap;
  int64_t inside = source < a.in ? steps(a.in - source) : 0;
  return {source, f.w_first + first * a.w_tap, max<int64_t>(0, min(f.taps - first, inside))};
}

inline Reach reach(const Axis& a, int64_t out) {
  return a.phases == 1 ? reach(a, phase(a, 0), out) : reach(a, phase(a, out % a.phases), out / a.phases);
}

// The taps (d, h) of a row of outputs: where the source row begins, and the first of the taps along W.
template <class S>
struct TapRow {
  const S* x;
  int64_t w;  // a tap's number
};

template <class S>
inline int64_t tap_rows(const Axis* axis, const Reach& d, const Reach& h, const S* x, const int64_t* x_axis,
                        TapRow<S>* rows) {
  int64_t n = 0;
  for (int64_t i = 0; i < d.count; ++i)
    for (int64_t k = 0; k < h.count; ++k, ++n) {
      int64_t sd = d.source + i * axis[kD].in_tap, sh = h.source + k * axis[kH].in_tap;
      int64_t wd = d.weight + i * axis[kD].w_tap, wh = h.weight + k * axis[kH].w_tap;
      rows[n] = {x + sd * x_axis[kD] + sh * x_axis[kH], (wd * axis[kH].kernel + wh) * axis[kW].kernel};
    }
  return n;
}

// Positions along W that a row goes on for before the next row: what its taps read stays in the first-level cache.
template <class S>
inline int64_t row_chunk(const Axis* axis, int64_t channels, int64_t tile) {
  int64_t bytes = axis[kD].kernel * axis[kH].kernel * channels * axis[kW].in_step * int64_t(sizeof(S));
  return max<int64_t>(1, kRowBytes / bytes / tile) * tile;
}

// A short rest joins the piece before it.
inline int64_t chunk_end(int64_t begin, int64_t end, int64_t chunk) {
  return end - begin < chunk + chunk / 2 ? end : begin + chunk;
}

// Blocks of outputs [image][D][H][W][channels]; along W in positions of a phase.
struct Blocks {
  int64_t N, width, channels;  // width: channels of a block, whole vectors
  int64_t size[kAxes], count[kAxes], c_blocks, tiles;
};

struct Block {
  int64_t n, begin[kAxes], end[kAxes], c, channels;
};

inline void count_tiles(Blocks& b, const int64_t* extent) {
  b.tiles = b.N;
  for (int a = 0; a < kAxes; ++a) b.tiles *= b.count[a] = ceil_div(extent[a], b.size[a]);
}

template <class S>
Blocks make_blocks(int64_t N, int64_t C, const Axis* axis) {
  constexpr int64_t L = kLanes<Compute<S>>;
  Blocks b{};
  int64_t extent[kAxes] = {axis[kD].out, axis[kH].out, axis[kW].count}, vectors = ceil_div(C, L);
  b.N = N, b.channels = C;
  b.width = ceil_div(vectors, ceil_div(vectors, kBlockVectors)) * L;
  b.c_blocks = ceil_div(C, b.width);
  b.size[kD] = extent[kD];
  b.size[kW] = ceil_div(extent[kW], ceil_div(extent[kW], kRowPositions));
  int64_t planes = min(axis[kD].kernel, axis[kD].in);
  int64_t row = min(b.size[kW] * axis[kW].in_step + axis[kW].kernel, axis[kW].in) * b.width * int64_t(sizeof(S));
  int64_t rows = max<int64_t>(1, (kBlockBytes / (row * planes) - axis[kH].kernel) / axis[kH].in_step);
  if (planes == 1) rows = extent[kH];  // they go on to the next row, not to the next plane
  b.size[kH] = ceil_div(extent[kH], ceil_div(extent[kH], rows * axis[kH].phases));
  count_tiles(b, extent);
  const int64_t least[kAxes] = {4, 4, 64};
  for (int a : {kD, kH, kW})
    while (b.tiles * b.c_blocks < kMinItems && b.size[a] > least[a])
      b.size[a] = ceil_div(b.size[a], 2), count_tiles(b, extent);
  return b;
}

inline Block block(const Blocks& b, const Axis* axis, int64_t tile, int64_t c_block) {
  Block r;
  for (int a = kW; a >= kD; tile /= b.count[a--]) {
    r.begin[a] = tile % b.count[a] * b.size[a];
    r.end[a] = min(r.begin[a] + b.size[a], a == kW ? axis[a].count : axis[a].out);
  }
  r.n = tile, r.c = c_block * b.width;
  r.channels = min(b.width, b.channels - r.c);
  return r;
}

}  // namespace
}  // namespace convoxel
