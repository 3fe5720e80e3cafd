// Winograd's weight gradient, the adjoint of conv_winograd.cpp's correlation in w: with V = B' x and W = A dy,
//
//   dU[point][c][k] = sum over tiles of V[point][tile][c] W[point][tile][k],   dw = G' dU G.
//
// The tiles go by in regions, each in two steps:
//   rows of tiles of x and of dy are packed and transformed along H and W:  [h, w point][plane][tile][channel];
//   for each h, w point, some tiles at a time: both are transformed along D, in the second-level cache, and
//   multiplied into the point's sums.
// Where dU is small, an item is a piece of the regions with sums of its own, which are added in order afterwards.
// Where it is large there is one dU, and all threads take part in each step of each region: a point belongs to one
// item and adds its regions in order, in runs of 16 whose sums are added up afterwards. So bits are the same for every
// number of threads, and no chain of sums is as long as the scan.
#include <type_traits>

#include "conv_weights.h"
#include "gemm.h"
#include "tables.h"
#include "winograd_region.h"

namespace convoxel {
namespace {

constexpr int64_t kSmallSums = 2 * 1024 * 1024;     // bytes of dU for pieces
constexpr int64_t kPieces = 32;                     // for machines of as many threads
constexpr int64_t kPanelBytes = 64 * 1024 * 1024;   // of dU of all pieces
constexpr int64_t kPieceBytes = 1024 * 1024;        // of V and W of a region of a piece
constexpr int64_t kRegionBytes = 16 * 1024 * 1024;  // the same for all threads, at least; twice that at most
constexpr int64_t kRun = 16;                        // regions
constexpr int64_t kRegionDepth = 8;                 // tiles: two more planes of x than outputs are transformed
constexpr int64_t kPassTiles = 64;                  // of one chain of sums
constexpr int64_t kPassBytes = 512 * 1024;          // of V and W of all points along D for a pass

struct Plan : Tiling {
  int64_t c_stride, k_stride, pass, of_group, pieces;          // of_group: regions; pieces: 0: all threads at each
  int64_t V, W, V_pass, W_pass, row, dU, panel, index[kAxes];  // elements of scratch; dU: of a group
};

template <class A>
void choose_regions(Plan& p) {
  int64_t deep = p.most[kD] = min(p.tiles[kD], kRegionDepth);
  int64_t column = p.points_hw * (extent_of(p, kD, deep) * p.c_stride + deep * p.M[kD] * p.k_stride) * sizeof(A);
  int64_t sums = p.dU * int64_t(sizeof(A));  // each region passes over them
  int64_t bytes = p.pieces ? kPieceBytes : max(kRegionBytes, min(2 * kRegionBytes, sums));
  int64_t room = max<int64_t>(1, bytes / column);
  p.most[kW] = min(p.tiles[kW], room);
  p.most[kH] = min(p.tiles[kH], max<int64_t>(1, room / p.most[kW]));
  even_regions(p);
}

template <class A>
Plan make_plan(const ConvGeometry& g) {
  Plan p{};
  set_tiling(p, g, false);
  ChannelBlocks<A> blocks(p.K);
  p.c_stride = round_up(p.C, kLanes<A>), p.k_stride = blocks.padded();
  p.dU = p.points_hw * p.points_d * p.k_stride * p.C;
  p.pieces = p.dU * int64_t(sizeof(A)) <= kSmallSums;
  choose_regions<A>(p);
  p.of_group = p.N * p.regions[kD] * p.regions[kH] * p.regions[kW];
  if (p.pieces) {
    int64_t most = kPanelBytes / (p.groups * p.dU * int64_t(sizeof(A)));
    p.pieces = max<int64_t>(1, min(min(p.of_group, most), max(kPieces, ceil_div(p.of_group, kRun))));
  }
  int64_t tile = p.points_d * (p.c_stride + p.k_stride) * int64_t(sizeof(A));
  p.pass = max<int64_t>(kPassTiles / 4, min(kPassTiles, kPassBytes / tile));
  int64_t plane = p.most[kH] * p.most[kW], rows = min(plane, ceil_div(p.pass, p.most[kD]));
  p.V = p.points_hw * point_step<A>(extent_of(p, kD, p.most[kD]) * plane * p.c_stride);
  p.W = p.points_hw * point_step<A>(p.most[kD] * p.M[kD] * plane * p.k_stride);
  p.V_pass = p.points_d * p.most[kD] * rows * p.c_stride;
  p.W_pass = p.points_d * p.most[kD] * rows * p.k_stride;
  p.row = packed_elements<A>(p, 1);
  p.panel = p.groups * p.k_stride * p.C * p.taps;
  for (int a = 0; a < kAxes; ++a) p.index[a] = extent_of(p, a, p.most[a]);
  return p;
}

// dU [block of k][c][k] += over tiles of V [tile][c] W [tile][k].
template <class A>
void multiply(const Plan& p, const OuterTile<A>& tiles, const A* V, const A* W, A* dU) {
  ChannelBlocks<A> blocks(p.K);
  for (int64_t kb = 0; kb < blocks.count; ++kb, W += blocks.width, dU += blocks.width * p.C)
    with_vectors(blocks.vectors(kb), [&](auto v) {
      constexpr int R = tile_rows(v());
      constexpr int64_t width = v() * kLanes<A>;
      int64_t parts = ceil_div(p.C, R);
      for (int64_t i = 0; i < parts; ++i) {
        Range c = piece(p.C, parts, i);
        with_rows<R>(c.end - c.begin,
                     [&](auto T) { outer_tile<A, T(), v()>(tiles, V + c.begin, W, dU + c.begin * width); });
      }
    });
}

// One h, w point of a region into its sums dU [d point][block of k][c][k].
template <class S, class A>
void add_point(const Plan& p, const Region& r, const Side<S, A>& x, const Side<S, A>& dy, int64_t q, A* V, A* W,
               A* dU) {
  int64_t rows = r.n[kH] * r.n[kW], most = min(rows, ceil_div(p.pass, p.most[kD]));
  for (int64_t row = 0; row < rows; row += most) {
    int64_t n = min(most, rows - row), tiles = r.n[kD] * n;
    const A* v = x.data + q * x.step + row * x.stride;
    const A* w = dy.data + q * dy.step + row * dy.stride;
    if (p.M[kD] == 1) {
      multiply<A>(p, {{r.n[kD], n}, {x.slice, x.stride}, {dy.slice, dy.stride}}, v, w, dU);
      continue;
    }
    transform_depth<InputTransform>(p, r.n[kD], n, v, x.slice, x.stride, x.stride, V);
    transform_depth<OutputAdjoint>(p, r.n[kD], n, w, dy.slice, dy.stride, dy.stride, W);
    for (int64_t d = 0; d < p.points_d; ++d)
      multiply<A>(p, {{1, tiles}, {0, x.stride}, {0, dy.stride}}, V + d * tiles * x.stride, W + d * tiles * dy.stride,
                  dU + d * p.k_stride * p.C);
  }
}

// Adds the finished sums of a run, and starts the next.
template <class A>
void end_run(A* run, A* dU, int64_t n, bool first) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    store(dU + i, first ? load(run + i) : load(dU + i) + load(run + i));
    store(run + i, Vec<A>{});
  }
}

// One vector of sums to its taps; `u_step` lies between points along D, `step` between taps.
template <class A>
void transform_sums(const Plan& p, const A* dU, int64_t u_step, A* panel, int64_t step) {
  constexpr int L = kLanes<A>;
  int64_t point = p.points_d * u_step, point_step[2] = {points(p.M[kW]) * point, point};
  int64_t plane_step[2] = {3 * L, L}, w_step[2] = {3 * step, step};
  alignas(64) A work[36 * L], planes[6 * 9 * L];
  with_outputs(p.M[kW], [&](auto M) {
    if (p.M[kD] == 1) return transform_plane<WeightAdjoint, M()>(dU, point_step, work, panel, w_step);
    for (int64_t d = 0; d < p.points_d; ++d)
      transform_plane<WeightAdjoint, M()>(dU + d * u_step, point_step, work, planes + d * 9 * L, plane_step);
  });
  if (p.M[kD] == 1) return;
  for (int64_t t = 0; t < 9; ++t)
    with_outputs(p.M[kD], [&](auto M) {
      transform_line<WeightAdjoint, M()>(planes + t * L, 9 * L, panel + t * step, 9 * step);
    });
}

// The panel [group][block of k][tap][c][k] from dU [group][h, w point][d point][block of k][c][k].
template <class A>
void transform_all_sums(const Plan& p, const A* dU, A* panel, int threads) {
  constexpr int64_t share = 32;
  ChannelBlocks<A> blocks(p.K);
  int64_t shares = ceil_div(p.C, share);
  parallel_for(threads, p.groups * blocks.count * shares, [&](int64_t item, int) {
    int64_t c0 = item % shares * share, kb = item / shares % blocks.count, group = item / shares / blocks.count;
    int64_t width = blocks.padded_width(kb), at = kb * blocks.width * p.C;
    const A* from = dU + group * p.dU + at;
    A* to = panel + group * p.k_stride * p.C * p.taps + at * p.taps;
    for (int64_t c = c0; c < min(c0 + share, p.C); ++c)
      for (int64_t k = 0; k < width; k += kLanes<A>)
        transform_sums(p, from + c * width + k, p.k_stride * p.C, to + c * width + k, p.C * width);
  });
}

// Both sides of the region at hand, and the memory to work in.
template <class S, class A>
struct Sides {
  Region r;
  Side<S, A> x, dy;
};

template <class S, class A>
Sides<S, A> take_sides(const Plan& p, const ConvCall& call, char*& scratch) {
  Sides<S, A> s{{},
                {join_x<S>(call), 0, 0, p.C, {}, p.c_stride, 0, 0, take<A>(scratch, p.V)},
                {join_y<S>(call), 0, 0, p.K, {}, p.k_stride, 0, 0, take<A>(scratch, p.W)}};
  for (int a = 0; a < kAxes; ++a) {
    s.x.packed[a].index = take<int64_t>(scratch, p.index[a]);
    s.dy.packed[a].index = take<int64_t>(scratch, p.index[a]);
  }
  return s;
}

template <class S, class A>
void move_to(const Plan& p, int64_t group, int64_t at, Sides<S, A>& s) {
  s.r = make_region(p, at);
  s.x.n = s.dy.n = at / (p.of_group / p.N);
  s.x.c0 = group * p.C, s.dy.c0 = group * p.K;
  place(p, s.r, true, s.x);
  place(p, s.r, false, s.dy);
}

// Rows of tiles are numbered: those of x, then those of dy.
template <class S, class A>
int64_t row_count(const Sides<S, A>& s) {
  return (s.x.packed[kD].extent + s.dy.packed[kD].extent) * s.r.n[kH];
}

template <class S, class A>
void transform_row(const Plan& p, const Sides<S, A>& s, int64_t i, A* row) {
  alignas(64) A work[36 * kLanes<A>];
  int64_t of_x = s.x.packed[kD].extent * s.r.n[kH], j = i < of_x ? i : i - of_x, d = j / s.r.n[kH], h = j % s.r.n[kH];
  if (i < of_x) transform_rows<InputTransform>(p, s.r, s.x, d, h, 1, row, work);
  else transform_rows<OutputAdjoint>(p, s.r, s.dy, d, h, 1, row, work);
}

template <class A>
struct Pass {
  A *row, *V, *W;
};

template <class A>
Pass<A> take_pass(const Plan& p, char*& scratch) {
  A* row = take<A>(scratch, p.row);
  A* V = take<A>(scratch, p.V_pass);
  return {row, V, take<A>(scratch, p.W_pass)};
}

// The sums of pieces: dU [piece][group][h, w point]...
template <class S, class A>
void by_pieces(const Plan& p, const ConvCall& call, A* dU, char* scratch, int64_t per_thread, int threads) {
  parallel_for(threads, p.pieces * p.groups, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    Pass<A> pass = take_pass<A>(p, mine);
    Sides<S, A> s = take_sides<S, A>(p, call, mine);
    A* sums = dU + item * p.dU;
    int64_t group = item % p.groups, size = p.dU / p.points_hw;
    zero(sums, p.dU);
    Range regions = piece(p.of_group, p.pieces, item / p.groups);
    for (int64_t at = regions.begin; at < regions.end; ++at) {
      move_to(p, group, at, s);
      for (int64_t i = 0; i < row_count(s); ++i) transform_row(p, s, i, pass.row);
      for (int64_t q = 0; q < p.points_hw; ++q) add_point(p, s.r, s.x, s.dy, q, pass.V, pass.W, sums + q * size);
    }
  });
  constexpr int64_t share = 4096;
  int64_t all = p.groups * p.dU;
  parallel_for(threads, ceil_div(all, share), [&](int64_t item, int) {
    for (int64_t i = item * share; i < min(all, (item + 1) * share); i += kLanes<A>) {
      Vec<A> sum = load(dU + i);
      for (int64_t j = 1; j < p.pieces; ++j) sum += load(dU + j * all + i);
      store(dU + i, sum);
    }
  });
}

// The sums of all regions by all threads: dU [group][h, w point]...; run: of some regions.
template <class S, class A>
void by_regions(const Plan& p, const ConvCall& call, A* dU, A* run, char* scratch, int64_t per_thread, int threads) {
  Sides<S, A> s = take_sides<S, A>(p, call, scratch);
  bool in_runs = p.of_group > kRun;
  for (int64_t i = 0; i < p.groups * p.of_group; ++i) {
    int64_t group = i / p.of_group, at = i % p.of_group, size = p.dU / p.points_hw;
    move_to(p, group, at, s);
    parallel_for(threads, row_count(s), [&](int64_t item, int thread) {
      char* mine = scratch + thread * per_thread;
      transform_row(p, s, item, take_pass<A>(p, mine).row);
    });
    parallel_for(threads, p.points_hw, [&](int64_t q, int thread) {
      char* mine = scratch + thread * per_thread;
      Pass<A> pass = take_pass<A>(p, mine);
      A* total = dU + group * p.dU + q * size;
      A* sums = in_runs ? run + q * size : total;
      if (at == 0) zero(sums, size);
      add_point(p, s.r, s.x, s.dy, q, pass.V, pass.W, sums);
      if (in_runs && (at % kRun == kRun - 1 || at == p.of_group - 1)) end_run(sums, total, size, at < kRun);
    });
  }
}

template <class A>
struct Bytes {
  int64_t dU, run, panel, sides, pass;
  explicit Bytes(const Plan& p) {
    auto of = [](int64_t n) { return aligned(n * int64_t(sizeof(A))); };
    dU = of(p.groups * p.dU * max<int64_t>(1, p.pieces)), run = of(p.pieces || p.of_group <= kRun ? 0 : p.dU);
    panel = of(p.panel), sides = of(p.V) + of(p.W), pass = of(p.row) + of(p.V_pass) + of(p.W_pass);
    for (int a = 0; a < kAxes; ++a) sides += 2 * aligned(p.index[a] * 8);
  }
};

template <class S>
void weight_grad(const ConvCall& call) {
  typedef Compute<S> A;
  Plan p = make_plan<A>(call.g);
  Bytes<A> bytes(p);
  int threads = team(call.g, call.threads);
  char* scratch = static_cast<char*>(call.scratch);
  A* dU = reinterpret_cast<A*>(scratch);
  A* run = reinterpret_cast<A*>(scratch += bytes.dU);
  A* panel = reinterpret_cast<A*>(scratch += bytes.run);
  scratch += bytes.panel;
  if (p.pieces) by_pieces<S>(p, call, dU, scratch, bytes.pass + bytes.sides, threads);
  else by_regions<S>(p, call, dU, run, scratch, bytes.pass, threads);
  transform_all_sums(p, dU, panel, threads);
  unpack_weights(Weights{false, p.groups, p.C, p.K, p.taps, p.C}, ChannelBlocks<A>(p.K), panel, 1,
                 static_cast<S*>(call.w), threads);
}

template <class S>
int64_t weight_grad_scratch(const ConvGeometry& g, int threads) {
  Plan p = make_plan<Compute<S>>(g);
  Bytes<Compute<S>> b(p);
  return b.dU + b.run + b.panel + (p.pieces ? (b.sides + b.pass) * threads : b.sides + b.pass * threads);
}

template <class S>
constexpr ConvKernel entry() {
  return {weight_grad<S>, weight_grad_scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvKernel conv_winograd_weight[kDTypes] = {entry<float>(), entry<bfloat16>(), {}};
}

}  // namespace convoxel
