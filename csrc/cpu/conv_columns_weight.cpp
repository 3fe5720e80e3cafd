// Weight gradient H(x, dy) by columns: dw [K, C * taps] = dy' X', written once, where it belongs. Vectors are of
// (c, tap), which dw has side by side; dy is broadcast.
#include <type_traits>

#include "conv_columns.h"
#include "tables.h"

namespace convoxel {
namespace {

template <class A>
using RowBlocks = ChannelBlocks<A>;  // vectors of (c, tap)

// X' [voxel][c, tap] of some channels, rows padded to whole vectors.
template <class A>
void gather_rows(const Columns& p, const A* planes, int64_t channels, const int32_t* index, int64_t row, A* X) {
  for (int64_t i = 0; i < p.pixels; ++i, index += p.taps, X += row) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < p.taps; ++t) X[c * p.taps + t] = planes[c * p.plane + index[t]];
    zero(X + channels * p.taps, row - channels * p.taps);
  }
}

// dw of a register tile's rows of k and one block of columns, by way of a small copy of the compute type.
template <class S, class A, int V>
void sum_tile(const Columns& p, Range k, const A* dy, int64_t dy_row, const A* X, int64_t X_row, int64_t used, A* tile,
              S* dw) {
  constexpr int64_t width = V * kLanes<A>;
  int64_t rows = k.end - k.begin;
  zero(tile, rows * width);
  for (int64_t i = 0; i < p.pixels; i += kChain) {
    OuterTile<A> g{{1, min(kChain, p.pixels - i)}, {0, dy_row}, {0, X_row}};
    with_rows<tile_rows(V)>(rows,
                            [&](auto T) { outer_tile<A, T(), V>(g, dy + i * dy_row + k.begin, X + i * X_row, tile); });
  }
  for (int64_t r = 0; r < rows; ++r) convert(tile + r * width, dw + (k.begin + r) * p.J, used);
}

template <class S, class A>
struct Scratch {
  bool in_place;  // dy is read where it lies
  int64_t index, dy, channels, planes, row, X, tile, per_thread;
  Scratch(const ConvGeometry& g, const Columns& p) {
    in_place = std::is_same<S, A>::value && g.y_last;
    channels = channels_per_item<A>(p);
    index = p.pixels * p.taps, dy = in_place ? 0 : p.pixels * g.K;
    row = RowBlocks<A>(channels * p.taps).padded(), X = p.pixels * row,
    planes = round_up(channels * p.plane, kLanes<A>);
    tile = kTileSums * kLanes<A>;
    per_thread = planes + X + tile;
  }
  int64_t bytes(int threads) const {
    return aligned(index * 4) + aligned(dy * sizeof(A)) + aligned(per_thread * threads * sizeof(A));
  }
};

// dy as rows [voxel of all images][K].
template <class S, class A>
const A* rows_of_dy(const ConvGeometry& g, const Columns& p, const View<S>& y, bool in_place, A* dy, int threads) {
  if constexpr (std::is_same<S, A>::value) {
    if (in_place) return y.data;
  }
  parallel_for(threads, p.N, [&](int64_t n, int) {
    if (y.c == 1) convert(y.data + n * y.n, dy + n * p.out * g.K, p.out * g.K);
    else transpose(y.data + n * y.n, y.c, dy + n * p.out * g.K, g.K, g.K, p.out);
  });
  return dy;
}

template <class S>
void weight_grad(const ConvCall& call) {
  typedef Compute<S> A;
  Columns p = make_columns(call.g);
  Scratch<S, A> size(call.g, p);
  View<S> x = view_x<S>(call);
  char* scratch = static_cast<char*>(call.scratch);
  int threads = team(call.g, call.threads);
  int32_t* index = take<int32_t>(scratch, size.index);
  A* packed = take<A>(scratch, size.dy);
  A* own = take<A>(scratch, size.per_thread * threads);
  fill_index(call.g, p, 1, p.taps, index, threads);
  const A* dy = rows_of_dy<S, A>(call.g, p, view_y<S>(call), size.in_place, packed, threads);
  int64_t parts = ceil_div(p.C, size.channels);
  parallel_for(threads, p.groups * parts, [&](int64_t item, int thread) {
    A *planes = own + thread * size.per_thread, *X = planes + size.planes, *tile = X + size.X;
    int64_t group = item / parts, c0 = item % parts * size.channels, channels = min(size.channels, p.C - c0);
    read_planes(x, p.N, p.in, group * p.C + c0, channels, planes, p.plane);
    for (int64_t c = 0; c < channels; ++c) planes[c * p.plane + p.plane - 1] = 0;
    gather_rows(p, planes, channels, index, size.row, X);
    RowBlocks<A> blocks(channels * p.taps);
    S* dw = static_cast<S*>(call.w) + group * p.K * p.J + c0 * p.taps;
    for (int64_t b = 0; b < blocks.count; ++b)
      with_vectors(blocks.vectors(b), [&](auto V) {
        int64_t tiles = ceil_div(p.K, tile_rows(V()));
        for (int64_t i = 0; i < tiles; ++i)
          sum_tile<S, A, V()>(p, piece(p.K, tiles, i), dy + group * p.K, call.g.K, X + b * blocks.width, size.row,
                              blocks.used(b), tile, dw + b * blocks.width);
      });
  });
}

template <class S>
int64_t weight_grad_scratch(const ConvGeometry& g, int threads) {
  return Scratch<S, Compute<S>>(g, make_columns(g)).bytes(threads);
}

template <class S>
constexpr ConvKernel entry() {
  return {weight_grad<S>, weight_grad_scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvKernel conv_columns_weight[kDTypes] = {entry<float>(), entry<bfloat16>(), entry<double>()};
}

}  // namespace convoxel
