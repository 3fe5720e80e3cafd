// Forward F(x, w) and input gradient G(dy, w) by columns: y = w X, where X [C * taps, voxels] holds the inputs of each
// output voxel, and dX = w' dy, added up voxel by voxel. Vectors are of voxels; weights are broadcast from where they
// lie.
#include "conv_columns.h"

#include <type_traits>

#include "tables.h"

namespace convoxel {
namespace {

// Vectors of voxels in blocks, as ChannelBlocks has them of channels.
template <class A>
using PixelBlocks = ChannelBlocks<A>;

constexpr int64_t kWalk = 4 * kChain;  // along w, before the next rows: long enough for the hardware to see it
constexpr int64_t kGathered = 16;      // channels of x that an item makes columns of

// X as [group][block of voxels][C * taps, as in w][voxel].
template <class S, class A>
void gather_columns(const Columns& p, const PixelBlocks<A>& blocks, const View<S>& x, const int32_t* index, A* columns,
                    A* scratch, int64_t per_thread, int threads) {
  int64_t parts = ceil_div(p.C, kGathered), width = blocks.padded();
  parallel_for(threads, p.groups * parts, [&](int64_t item, int thread) {
    A* planes = scratch + thread * per_thread;
    int64_t group = item / parts, c0 = item % parts * kGathered, channels = min(kGathered, p.C - c0);
    read_planes(x, p.N, p.in, group * p.C + c0, channels, planes, p.plane);
    for (int64_t c = 0; c < channels; ++c) {
      const A* plane = planes + c * p.plane;
      planes[c * p.plane + p.plane - 1] = 0;
      for (int64_t b = 0; b < blocks.count; ++b) {
        A* block = columns + (group * width + b * blocks.width) * p.J;
        const int32_t* at = index + b * blocks.width;
        for (int64_t t = 0; t < p.taps; ++t, at += width) {
          A* to = block + p.row(c0 + c, t, p.C) * blocks.padded_width(b);
          for (int64_t i = 0; i < blocks.padded_width(b); ++i) to[i] = plane[at[i]];
        }
      }
    }
  });
}

// rows of w, walked along C * taps in chains, times the columns of one block: y [rows][voxel].
template <class A, int V>
void multiply(const A* w, int64_t J, int64_t rows, const A* columns, A* y) {
  constexpr int R = tile_rows(V);
  constexpr int64_t width = V * kLanes<A>;
  CorrelateTile<A> g{};
  g.taps[0] = g.taps[1] = g.taps[2] = g.end = 1;
  g.x_row = J, g.y_row = width, g.tail = kLanes<A>;
  int64_t parts = ceil_div(rows, R);
  for (int64_t walk = 0; walk < J; walk += kWalk)
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t j = walk; j < min(J, walk + kWalk); j += kChain) {
        Range r = piece(rows, parts, i);
        g.channels = min(kChain, J - j);
        with_rows<R>(r.end - r.begin, [&](auto T) {
          correlate_tile<A, T(), V>(g, w + r.begin * J + j, columns + j * width, y + r.begin * width);
        });
      }
}

template <class S, class A>
struct ForwardScratch {
  int64_t index, columns, per_thread;
  ForwardScratch(const Columns& p, const PixelBlocks<A>& b) {
    constexpr bool same = std::is_same<S, A>::value;
    index = p.taps * b.padded();
    columns = p.groups * b.padded() * p.J;
    per_thread = round_up(max(kGathered * p.plane, kRowsPerItem * (b.width + (same ? 0 : p.J))), kLanes<A>);
  }
  int64_t bytes(int threads) const {
    return aligned(index * 4) + aligned(columns * sizeof(A)) + aligned(per_thread * threads * sizeof(A));
  }
};

template <class S>
void forward(const ConvCall& call) {
  typedef Compute<S> A;
  constexpr bool same = std::is_same<S, A>::value;
  Columns p = make_columns(call.g);
  PixelBlocks<A> blocks(p.pixels);
  ForwardScratch<S, A> size(p, blocks);
  View<S> y = view_y<S>(call);
  const S *w = static_cast<const S*>(call.w), *b = static_cast<const S*>(call.b);
  char* scratch = static_cast<char*>(call.scratch);
  int threads = team(call.g, call.threads);
  int32_t* index = take<int32_t>(scratch, size.index);
  A* columns = take<A>(scratch, size.columns);
  A* own = take<A>(scratch, size.per_thread * threads);
  for (int64_t t = 0; t < p.taps; ++t)
    for (int64_t i = p.pixels; i < blocks.padded(); ++i) index[t * blocks.padded() + i] = int32_t(p.plane - 1);
  fill_index(call.g, p, blocks.padded(), 1, index, threads);
  gather_columns(p, blocks, view_x<S>(call), index, columns, own, size.per_thread, threads);
  int64_t parts = ceil_div(p.K, kRowsPerItem);
  parallel_for(threads, p.groups * parts * blocks.count, [&](int64_t item, int thread) {
    A* tile = own + thread * size.per_thread;
    int64_t block = item % blocks.count, part = item / blocks.count % parts, group = item / blocks.count / parts;
    Range k = piece(p.K, parts, part);
    int64_t rows = k.end - k.begin, width = blocks.padded_width(block);
    int64_t first = (group * p.K + k.begin) * p.J;
    const A* weights;
    if constexpr (same) {
      weights = w + first;
    } else {
      weights = tile + kRowsPerItem * blocks.width;
      read_weights(w, p.w_float, first, tile + kRowsPerItem * blocks.width, rows * p.J);
    }
    for (int64_t r = 0; r < rows; ++r) {
      A bias = b ? to_compute(b[group * p.K + k.begin + r]) : A(0);
      for (int64_t i = 0; i < width; ++i) tile[r * width + i] = bias;
    }
    with_vectors(blocks.vectors(block), [&](auto V) {
      multiply<A, V()>(weights, p.J, rows, columns + (group * blocks.padded() + block * blocks.width) * p.J, tile);
    });
    int64_t begin = block * blocks.width;
    write_rows(tile, width, begin, begin + blocks.used(block), p.out, group * p.K + k.begin, rows, y);
  });
}

template <class S>
int64_t forward_scratch(const ConvGeometry& g, int threads) {
  typedef Compute<S> A;
  Columns p = make_columns(g);
  return ForwardScratch<S, A>(p, PixelBlocks<A>(p.pixels)).bytes(threads);
}

// Input gradient ------------------------------------------------------------------------------------

// dX of some channels of x over one block of voxels: rows [c, tap], summed over all output channels.
template <class A, int V>
void multiply_transposed(const A* w, int64_t rows, int64_t K, const A* dy, A* dX) {
  constexpr int R = tile_rows(V);
  constexpr int64_t width = V * kLanes<A>;
  zero(dX, rows * width);
  int64_t parts = ceil_div(rows, R);
  for (int64_t k = 0; k < K; k += kChain) {
    OuterTile<A> g{{1, min(kChain, K - k)}, {0, rows}, {0, width}};
    for (int64_t i = 0; i < parts; ++i) {
      Range r = piece(rows, parts, i);
      with_rows<R>(r.end - r.begin, [&](auto T) {
        outer_tile<A, T(), V>(g, w + k * rows + r.begin, dy + k * width, dX + r.begin * width);
      });
    }
  }
}

template <class A>
struct InputGradScratch {
  int64_t index, dy, channels, weights, tile, planes, per_thread;
  InputGradScratch(const Columns& p, const PixelBlocks<A>& b) {
    channels = channels_per_item<A>(p);
    index = p.taps * p.pixels;
    dy = p.groups * p.K * b.padded();
    weights = round_up(p.K * channels * p.taps, kLanes<A>), tile = channels * p.taps * b.width,
    planes = round_up(channels * p.plane, kLanes<A>);
    per_thread = weights + tile + planes;
  }
  int64_t bytes(int threads) const {
    return aligned(index * 4) + aligned(dy * sizeof(A)) + aligned(per_thread * threads * sizeof(A));
  }
};

// dy as [group][block of voxels][K][voxel].
template <class S, class A>
void pack_dy(const Columns& p, const PixelBlocks<A>& blocks, const View<S>& y, A* dy, int threads) {
  parallel_for(threads, p.groups * blocks.count, [&](int64_t item, int) {
    int64_t group = item / blocks.count, b = item % blocks.count, width = blocks.padded_width(b);
    A* to = dy + (group * blocks.padded() + b * blocks.width) * p.K;
    zero(to, p.K * width);
    int64_t begin = b * blocks.width, end = begin + blocks.used(b);
    for (int64_t i = begin; i < end;) {
      int64_t n = i / p.out, at = i % p.out, run = min(end - i, p.out - at);
      View<S> part = y;
      part.data += n * y.n + at * y.axis[kW];
      read_planes(part, 1, run, group * p.K, p.K, to + (i - begin), width);
      i += run;
    }
  });
}

template <class S>
void input_grad(const ConvCall& call) {
  typedef Compute<S> A;
  Columns p = make_columns(call.g);
  PixelBlocks<A> blocks(p.pixels);
  InputGradScratch<A> size(p, blocks);
  View<S> x = view_x<S>(call);
  const S *w = static_cast<const S*>(call.w), *b = static_cast<const S*>(call.b);
  char* scratch = static_cast<char*>(call.scratch);
  int threads = team(call.g, call.threads);
  int32_t* index = take<int32_t>(scratch, size.index);
  A* dy = take<A>(scratch, size.dy);
  A* own = take<A>(scratch, size.per_thread * threads);
  fill_index(call.g, p, p.pixels, 1, index, threads);
  pack_dy(p, blocks, view_y<S>(call), dy, threads);
  int64_t parts = ceil_div(p.C, size.channels);
  parallel_for(threads, p.groups * parts, [&](int64_t item, int thread) {
    A *weights = own + thread * size.per_thread, *tile = weights + size.weights, *planes = tile + size.tile;
    int64_t group = item / parts, c0 = item % parts * size.channels, channels = min(size.channels, p.C - c0);
    int64_t rows = channels * p.taps;
    int64_t runs = p.w_last ? p.taps : 1, run = rows / runs;  // that lie side by side
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t r = 0; r < runs; ++r)
        read_weights(w, p.w_float, (group * p.K + k) * p.J + p.row(c0, r, p.C), weights + k * rows + r * run, run);
    for (int64_t c = 0; c < channels; ++c) {
      A bias = b ? to_compute(b[group * p.C + c0 + c]) : A(0);
      for (int64_t i = 0; i < p.plane; ++i) planes[c * p.plane + i] = bias;
    }
    for (int64_t block = 0; block < blocks.count; ++block) {
      int64_t width = blocks.padded_width(block);
      with_vectors(blocks.vectors(block), [&](auto V) {
        multiply_transposed<A, V()>(weights, rows, p.K, dy + (group * blocks.padded() + block * blocks.width) * p.K,
                                    tile);
      });
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < p.taps; ++t) {
          A* plane = planes + c * p.plane;
          const A* from = tile + p.row(c, t, channels) * width;
          const int32_t* at = index + t * p.pixels + block * blocks.width;
          for (int64_t i = 0; i < blocks.used(block); ++i) plane[at[i]] += from[i];
        }
    }
    write_rows(planes, p.plane, 0, p.N * p.in, p.in, group * p.C + c0, channels, x);
  });
}

template <class S>
int64_t input_grad_scratch(const ConvGeometry& g, int threads) {
  typedef Compute<S> A;
  Columns p = make_columns(g);
  return InputGradScratch<A>(p, PixelBlocks<A>(p.pixels)).bytes(threads);
}

template <class S>
constexpr ConvCorrelate entries() {
  return {forward<S>, input_grad<S>, forward_scratch<S>, input_grad_scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_columns[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
