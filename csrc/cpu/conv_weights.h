// Weights between torch's layout [K, C, taps] and the panels that the kernels read and write, where a vector is one
// of output channels: [group][block of k][block of c][tap][c][k].
#pragma once
#include "conv_tile.h"

namespace convoxel {
namespace {

// What a correlation sees of w: C in, K out, both of a group; G swaps them and flips the taps.
struct Weights {
  bool transposed;
  int64_t groups, C, K, taps, channel_block;
};

// w as [group][block of k][block of c][tap][c][k]. Rows of w (output channels) become vectors: F reads runs of
// (c, tap), G runs of taps, flipped.
template <class S, class A>
void pack_weights(const Weights& p, const ChannelBlocks<A>& blocks, const S* w, A* panel, int threads) {
  constexpr int L = kLanes<A>;
  int64_t c_blocks = ceil_div(p.C, p.channel_block);
  int64_t k_step = (p.transposed ? 1 : p.C) * p.taps, c_step = (p.transposed ? p.K : 1) * p.taps;
  parallel_for(threads, p.groups * blocks.count * c_blocks, [&](int64_t item, int) {
    int64_t cb = item % c_blocks, kb = item / c_blocks % blocks.count, group = item / c_blocks / blocks.count;
    int64_t c0 = cb * p.channel_block, channels = min(p.channel_block, p.C - c0), width = blocks.padded_width(kb);
    A* to = panel + (group * blocks.padded() + kb * blocks.width) * p.C * p.taps + c0 * p.taps * width;
    const S* from = w + group * p.C * p.K * p.taps + kb * blocks.width * k_step + c0 * c_step;
    int64_t runs = p.transposed ? channels : 1, run = p.transposed ? p.taps : channels * p.taps;
    for (int v = 0; v < blocks.vectors(kb); ++v, from += L * k_step, to += L) {
      int rows = v == blocks.vectors(kb) - 1 ? blocks.tail(kb) : L;
      for (int64_t u = 0; u < runs; ++u)
        for (int64_t j = 0; j < run; j += L) {
          int n = int(min<int64_t>(L, run - j));
          Vec<A> r[L];
          if (k_step == 1) {
            r[0] = load(from + u * c_step, rows);
          } else {
            for (int i = 0; i < L; ++i) r[i] = i < rows ? load(from + i * k_step + u * c_step + j, n) : Vec<A>{};
            transpose_block<A>(r);
          }
          for (int i = 0; i < n; ++i) {
            int64_t c = p.transposed ? u : (j + i) / p.taps;
            int64_t tap = p.transposed ? p.taps - 1 - (j + i) : (j + i) % p.taps;
            store(to + (tap * channels + c) * width, r[i]);
          }
        }
    }
  });
}

// Back, the sum of several panels, added in order: vectors of k become rows, and (c, tap) is contiguous. An item is
// 64 columns of one block.
template <class S, class A>
void unpack_weights(const Weights& p, const ChannelBlocks<A>& blocks, const A* panels, int64_t count, S* w,
                    int threads) {
  constexpr int L = kLanes<A>;
  constexpr int64_t slice = 64;
  int64_t slices = ceil_div(p.channel_block * p.taps, slice), c_blocks = ceil_div(p.C, p.channel_block);
  int64_t panel = p.groups * blocks.padded() * p.C * p.taps;
  parallel_for(threads, p.groups * blocks.count * c_blocks * slices, [&](int64_t item, int) {
    int64_t begin = item % slices * slice, rest = item / slices, c0 = rest % c_blocks * p.channel_block;
    int64_t kb = rest / c_blocks % blocks.count, group = rest / c_blocks / blocks.count;
    int64_t channels = min(p.channel_block, p.C - c0), end = min(begin + slice, channels * p.taps);
    int64_t width = blocks.padded_width(kb), w_row = p.C * p.taps;
    const A* from = panels + (group * blocks.padded() + kb * blocks.width) * w_row + c0 * p.taps * width;
    S* to = w + (group * p.K + kb * blocks.width) * w_row + c0 * p.taps;
    for (int v = 0; v < blocks.vectors(kb); ++v) {
      int used = v == blocks.vectors(kb) - 1 ? blocks.tail(kb) : L;
      for (int64_t j = begin; j < end; j += L) {
        int n = int(min<int64_t>(L, end - j));
        Vec<A> r[L];
        for (int i = 0; i < L; ++i) {
          r[i] = Vec<A>{};
          const A* at = from + ((j + i) % p.taps * channels + (j + i) / p.taps) * width + v * L;
          for (int64_t piece = 0; i < n && piece < count; ++piece) r[i] += load(at + piece * panel);
        }
        transpose_block<A>(r);
        for (int i = 0; i < used; ++i) store(to + (v * L + i) * w_row + j, r[i], n);
      }
    }
  });
}

}  // namespace
}  // namespace convoxel
