// How Winograd's convolution (conv_winograd.cpp) cuts a problem: which order of work, regions, blocks, scratch.
#pragma once
#include "winograd_region.h"

namespace convoxel {
namespace {

constexpr int64_t kChain = 64;                 // channels of one chain of sums; their X stays in L1
constexpr int64_t kNearWeights = 1024 * 1024;  // bytes of U that stay in the second-level cache
constexpr int64_t kFewTiles = 128;             // per image, at most, for weights first
constexpr int64_t kBatch = 8;                  // regions, weights first

struct Plan : Tiling {
  bool transposed, weights_first, w_last, w_float;
  int64_t all, most_tiles, c_stride, batch;  // all: regions of all images and groups; most_tiles: of a region
  int block_vectors;
  int64_t panel, transformed, rows, V, X, Y, M_size, out_tile, index[kAxes];  // elements of scratch
};

// Regions of many tiles, so that the weights' way from a far cache is shared by them; few where the weights stay in
// the second-level cache beside them. Among these, the ones with little halo.
template <class A>
void choose_regions(Plan& p) {
  bool near = p.C * p.K * p.points_d * p.points_hw * int64_t(sizeof(A)) <= kNearWeights;
  p.weights_first = !near && p.tiles[kD] * p.tiles[kH] * p.tiles[kW] <= kFewTiles;
  const int64_t T = near ? 14 : p.weights_first ? 64 : 32;
  double best = 0;
  int64_t t[kAxes];
  for (t[kD] = 1; t[kD] <= min<int64_t>(p.tiles[kD], T); ++t[kD])
    for (t[kH] = 1; t[kH] <= min<int64_t>(p.tiles[kH], T / t[kD]); ++t[kH])
      for (t[kW] = 1; t[kW] <= min<int64_t>(p.tiles[kW], T / t[kD] / t[kH]); ++t[kW]) {
        double regions = 1, halo = 1, tiles = 1;
        int64_t most = 1;
        for (int a = 0; a < kAxes; ++a) {
          int64_t n = ceil_div(p.tiles[a], t[a]);
          regions *= double(n), halo *= double(extent_of(p, a, t[a]));
          tiles *= double(p.tiles[a]) / double(n), most *= ceil_div(p.tiles[a], n);
        }
        int64_t parts = ceil_div(most, tile_rows(p.block_vectors));
        double cost = regions * (double(p.points_d * p.points_hw) * (tiles + 2.0 * double(parts)) + 0.3 * halo + 200);
        if (best != 0 && cost >= best) continue;
        best = cost;
        for (int a = 0; a < kAxes; ++a) p.most[a] = t[a];
      }
  even_regions(p);
}

template <class A>
Plan make_plan(const ConvGeometry& g, bool transposed) {
  constexpr int L = kLanes<A>;
  Plan p{};
  p.transposed = transposed, p.w_last = g.w_last, p.w_float = g.w_float;
  set_tiling(p, g, transposed);
  p.block_vectors = min(kTileVectors, p.K > 2 * L ? 4 : 2);
  choose_regions<A>(p);
  if (p.weights_first) p.block_vectors = 2;
  p.all = p.N * p.groups, p.most_tiles = 1;
  for (int a = 0; a < kAxes; ++a) {
    p.all *= p.regions[a], p.most_tiles *= p.most[a];
    p.index[a] = extent_of(p, a, p.most[a]);
  }
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  p.batch = p.weights_first ? min(p.all, max<int64_t>(1, min(kBatch, kMinItems / blocks.count))) : 1;
  p.c_stride = round_up(p.C, L);
  p.panel = p.groups * blocks.padded() * p.C * p.taps;
  int64_t columns = points(p.M[kW]) * p.points_d;  // of which weights first has the weights and sums at a time
  p.transformed =
      p.weights_first ? columns * kChain * blocks.width : p.points_hw * p.points_d * p.groups * blocks.padded() * p.C;
  p.rows = packed_elements<A>(p, p.weights_first ? 1 : p.most[kH]);
  p.V = p.points_hw * point_step<A>(p.index[kD] * p.most[kH] * p.most[kW] * p.c_stride);
  p.X = p.points_d * p.most_tiles * (p.weights_first ? p.points_hw * p.c_stride : kChain);
  p.Y = (p.weights_first ? columns : p.points_d) * p.most_tiles * blocks.width;
  p.M_size = p.points_hw * point_step<A>(p.M[kD] * p.most_tiles * blocks.width);
  p.out_tile = p.most_tiles * p.M[kD] * p.M[kH] * p.M[kW] * blocks.width;
  return p;
}

}  // namespace
}  // namespace convoxel
