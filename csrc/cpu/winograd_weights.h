// The weights of Winograd's convolution, transformed: all of them, or those of one h point.
#pragma once
#include "winograd_plan.h"

namespace convoxel {
namespace {

// All points of one vector of weights.
template <class A>
void transform_weight(const Plan& p, const A* panel, int64_t tap_step, A* U, int64_t u_step) {
  constexpr int L = kLanes<A>;
  int64_t w_step[2] = {3 * tap_step, tap_step}, point_hw = p.points_d * u_step;
  int64_t hw_step[2] = {points(p.M[kW]) * point_hw, point_hw}, plane_step[2] = {points(p.M[kW]) * L, L};
  alignas(64) A work[36 * L], planes[3 * 36 * L];
  with_outputs(p.M[kW], [&](auto M) {
    if (p.M[kD] == 1) return transform_plane<WeightTransform, M()>(panel, w_step, work, U, hw_step);
    for (int64_t d = 0; d < 3; ++d)
      transform_plane<WeightTransform, M()>(panel + d * 9 * tap_step, w_step, work, planes + d * p.points_hw * L,
                                            plane_step);
  });
  if (p.M[kD] == 1) return;
  for (int64_t q = 0; q < p.points_hw; ++q)
    with_outputs(p.M[kD], [&](auto M) {
      transform_line<WeightTransform, M()>(planes + q * L, p.points_hw * L, U + q * point_hw, u_step);
    });
}

// U [group][block of k][h, w point][d point][c][k] from the packed panel [group][block of k][tap][c][k]. An item is
// a run of channels: threads that write side by side would fetch each other's lines.
template <class A>
void transform_weights(const Plan& p, const A* panel, A* U, int threads) {
  constexpr int64_t share = 32;
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  int64_t shares = ceil_div(p.C, share);
  parallel_for(threads, p.groups * blocks.count * shares, [&](int64_t item, int) {
    int64_t c0 = item % shares * share, kb = item / shares % blocks.count, group = item / shares / blocks.count;
    int64_t width = blocks.padded_width(kb), at = (group * blocks.padded() + kb * blocks.width) * p.C;
    for (int64_t c = c0; c < min(c0 + share, p.C); ++c)
      for (int64_t k = 0; k < width; k += kLanes<A>)
        transform_weight(p, panel + at * p.taps + c * width + k, p.C * width,
                         U + at * p.points_d * p.points_hw + c * width + k, p.C * width);
  });
}

// U [w point][d point] of one h point, of one vector of weights.
template <class A>
void transform_weight_row(const Plan& p, const A* panel, int64_t tap_step, int64_t h, A* U, int64_t u_step) {
  constexpr int L = kLanes<A>;
  alignas(64) A planes[3 * 6 * L];
  bool deep = p.M[kD] > 1;
  with_outputs(p.M[kW], [&](auto M) {
    for (int64_t d = 0; d < p.axis[kD].kernel; ++d, panel += 9 * tap_step) {
      Vec<A> row[3], column[3], u[points(M())];
      for (int64_t j = 0; j < 3; ++j) {
        for (int64_t i = 0; i < 3; ++i) column[i] = load(panel + (i * 3 + j) * tap_step);
        WeightTransform::apply<M()>(column, u);
        row[j] = u[h];
      }
      WeightTransform::apply<M()>(row, u);
      for (int64_t w = 0; w < points(M()); ++w) store(deep ? planes + (d * 6 + w) * L : U + w * u_step, u[w]);
    }
  });
  if (!deep) return;
  for (int64_t w = 0; w < points(p.M[kW]); ++w)
    with_outputs(p.M[kD], [&](auto M) {
      transform_line<WeightTransform, M()>(planes + w * L, 6 * L, U + w * p.points_d * u_step, u_step);
    });
}

}  // namespace
}  // namespace convoxel
