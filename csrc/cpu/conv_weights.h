// Weights between torch's layouts [K, C, taps] and, channels-last, [K, taps, C] and the panels that the kernels read
// and write, where a vector is one of output channels: [group][block of k][block of c][tap][c][k].
#pragma once
#include <type_traits>

#include "conv_tile.h"

namespace convoxel {
namespace {

// What a correlation sees of w: C in, K out, both of a group; G swaps them and flips the taps.
struct Weights {
  bool transposed;
  int64_t groups, C, K, taps, channel_block;
  bool last = false;      // w is channels-last
  bool in_float = false;  // w is float beside bfloat16 tensors
};

// n values of weights as if they were stored as S.
template <class S, class W>
inline Vec<Compute<S>> load_weights(const W* w, int n) {
  constexpr int L = kLanes<Compute<S>>;
  Vec<Compute<S>> v = n == L ? load(w) : load(w, n);
  if constexpr (std::is_same<S, W>::value) return v;
  else return as_stored<S>(v);
}

// The weight at a place as if it were stored as S.
template <class S>
inline Compute<S> weight_at(const S* w, bool in_float, int64_t at) {
  if (!in_float) return to_compute(w[at]);
  S rounded;
  from_compute(Compute<S>(reinterpret_cast<const float*>(w)[at]), rounded);
  return to_compute(rounded);
}

// n of them, from that place on.
template <class S, class A>
inline void read_weights(const S* w, bool in_float, int64_t at, A* to, int64_t n) {
  if (!in_float) return convert(w + at, to, n);
  for (int64_t i = 0; i < n; ++i) to[i] = weight_at(w, in_float, at + i);
}

// w as [group][block of k][block of c][tap][c][k]. Rows of w (output channels) become vectors, by way of runs that lie
// side by side: of (c, tap) for F, of taps for G, which flips them; of c for F where w is channels-last, and of k for
// G.
template <class S, class W, class A>
void pack_weights_from(const Weights& p, const ChannelBlocks<A>& blocks, const W* w, A* panel, int threads) {
  constexpr int L = kLanes<A>;
  int64_t c_blocks = ceil_div(p.C, p.channel_block);
  int64_t k_step = !p.transposed ? p.C * p.taps : p.last ? 1 : p.taps;
  int64_t c_step = p.transposed ? p.K * p.taps : p.last ? 1 : p.taps;
  int64_t run_step = p.last ? (p.transposed ? p.K : p.C) : c_step;
  parallel_for(threads, p.groups * blocks.count * c_blocks, [&](int64_t item, int) {
    int64_t cb = item % c_blocks, kb = item / c_blocks % blocks.count, group = item / c_blocks / blocks.count;
    int64_t c0 = cb * p.channel_block, channels = min(p.channel_block, p.C - c0), width = blocks.padded_width(kb);
    A* to = panel + (group * blocks.padded() + kb * blocks.width) * p.C * p.taps + c0 * p.taps * width;
    const W* from = w + group * p.C * p.K * p.taps + kb * blocks.width * k_step + c0 * c_step;
    bool joint = p.transposed == p.last;  // runs, or what is in a run, count channels and taps together
    int64_t all = channels * p.taps, runs = p.transposed ? channels : p.taps;
    if (joint) runs = p.last ? all : 1;
    int64_t run = all / runs;
    for (int v = 0; v < blocks.vectors(kb); ++v, from += L * k_step, to += L) {
      int rows = v == blocks.vectors(kb) - 1 ? blocks.tail(kb) : L;
      for (int64_t u = 0; u < runs; ++u)
        for (int64_t j = 0; j < run; j += L) {
          int n = int(min<int64_t>(L, run - j));
          Vec<A> r[L];
          if (k_step == 1) {
            r[0] = load_weights<S>(from + u * run_step, rows);
          } else {
            for (int i = 0; i < L; ++i)
              r[i] = i < rows ? load_weights<S>(from + i * k_step + u * run_step + j, n) : Vec<A>{};
            transpose_block<A>(r);
          }
          for (int i = 0; i < n; ++i) {
            int64_t outer = u, inner = j + i;
            if (joint) outer = (u + inner) / p.taps, inner = (u + inner) % p.taps;
            int64_t c = joint || p.transposed ? outer : inner, tap = joint || p.transposed ? inner : outer;
            if (p.transposed) tap = p.taps - 1 - tap;
            store(to + (tap * channels + c) * width, r[i]);
          }
        }
    }
  });
}

template <class S, class A>
void pack_weights(const Weights& p, const ChannelBlocks<A>& blocks, const S* w, A* panel, int threads) {
  if constexpr (std::is_same<S, bfloat16>::value) {
    if (p.in_float) return pack_weights_from<S>(p, blocks, reinterpret_cast<const float*>(w), panel, threads);
  }
  pack_weights_from<S>(p, blocks, w, panel, threads);
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
