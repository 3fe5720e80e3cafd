// Weights as the AMX correlations (conv_amx.cpp) load them, 16 pairs of channels x 16 output channels a tile, from
// torch's layouts [K, C, taps] and, channels-last, [K, taps, C]:
//   [pair of blocks of k][block of c][tap][block of k][pair of c][k][c of the pair], taps flipped for G.
#pragma once
#include "amx_plan.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

inline Words load_pairs(const bfloat16* p, __mmask32 some) { return (Words)_mm512_maskz_loadu_epi16(some, p); }
inline Words load_pairs(const float* p, __mmask32 some) {
  __m512 low = _mm512_maskz_loadu_ps(__mmask16(some), p), high = _mm512_maskz_loadu_ps(__mmask16(some >> 16), p + 16);
  return (Words)_mm512_cvtne2ps_pbh(high, low);
}

// columns[j][16] = the elements j < n of `rows` rows, `step` apart.
template <class W>
inline void gather_columns(const W* src, int64_t step, int64_t rows, int64_t n, uint16_t* columns) {
  for (int64_t j = 0; j < n; j += 32, columns += 32 * kRows) {
    __mmask32 some = first_lanes(n - j);
    Words r[kRows];
    for (int64_t i = 0; i < kRows; ++i) r[i] = i < rows ? load_pairs(src + i * step + j, some) : Words{};
    transpose_block<float>(r);
    for (int i = 0; i < kRows && j + 2 * i < n; ++i) {
      VecU16 even = __builtin_convertvector((VecU32)r[i], VecU16),
             odd = __builtin_convertvector((VecU32)r[i] >> 16, VecU16);
      __builtin_memcpy(columns + 2 * i * kRows, &even, sizeof even);
      __builtin_memcpy(columns + (2 * i + 1) * kRows, &odd, sizeof odd);
    }
  }
}

// Elements that the columns of 16 output channels and 32 input channels take, however they come.
inline int64_t column_elements(const Plan& p) { return kChannels * round_up(p.taps, 32) * kRows; }

// From one column to that of the next channel, of the next tap.
struct ColumnSteps {
  int64_t c, tap;
};

// Columns of `rows` output channels and some input channels, from the first of them on: by runs of what lies side by
// side, (c, tap) for F, taps for G; where w is channels-last c for F, and k, a column as it is, for G.
template <class W>
inline ColumnSteps read_columns(const Plan& p, const W* from, int64_t rows, int64_t channels, uint16_t* columns) {
  int64_t row = p.C * p.taps, c_step = p.K * p.taps;
  if (!p.w_last && !p.transposed) {
    gather_columns(from, row, rows, channels * p.taps, columns);
    return {p.taps * kRows, kRows};
  }
  ColumnSteps step{kRows, kChannels * kRows};
  if (!p.w_last) {
    step = {round_up(p.taps, 32) * kRows, kRows};
    for (int64_t c = 0; c < channels; ++c)
      gather_columns(from + c * c_step, p.taps, rows, p.taps, columns + c * step.c);
  } else if (!p.transposed) {
    for (int64_t t = 0; t < p.taps; ++t) gather_columns(from + t * p.C, row, rows, channels, columns + t * step.tap);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < p.taps; ++t) {
        Words column = load_pairs(from + c * c_step + t * p.K, first_lanes(rows));
        __builtin_memcpy(columns + c * step.c + t * step.tap, &column, kRows * sizeof(bfloat16));
      }
  }
  return step;
}

// columns: `per_thread` elements for each thread.
template <class W>
inline void pack_weights(const Plan& p, const W* w, bfloat16* panel, uint16_t* columns, int64_t per_thread,
                         int threads) {
  int64_t k_step = !p.transposed ? p.C * p.taps : p.w_last ? 1 : p.taps;
  int64_t c_step = p.transposed ? p.K * p.taps : p.w_last ? 1 : p.taps;
  parallel_for(threads, p.pairs * p.blocks, [&](int64_t item, int thread) {
    uint16_t* mine = columns + thread * per_thread;
    int64_t k0 = item / p.blocks * kOutputs, c0 = item % p.blocks * kChannels, channels = min(kChannels, p.C - c0);
    bfloat16* to = panel + item * p.taps * kStepWeights;
    for (int64_t k = k0; k < k0 + kOutputs; k += kRows, to += kRows * kChannels) {
      int64_t rows = max<int64_t>(0, min(kRows, p.K - k));
      ColumnSteps step = read_columns(p, w + k * k_step + c0 * c_step, rows, channels, mine);
      for (int64_t c = 0; c < kChannels; c += 2)
        for (int64_t t = 0; t < p.taps; ++t) {
          auto column_of = [&](int64_t at) {
            VecU16 v{};
            if (at < channels) __builtin_memcpy(&v, mine + at * step.c + t * step.tap, sizeof v);
            return v;
          };
          int64_t tap = p.transposed ? p.taps - 1 - t : t;
          Words pairs = interleave(column_of(c), column_of(c + 1));
          __builtin_memcpy(to + tap * kStepWeights + c * kRows, &pairs, sizeof pairs);
        }
    }
  });
}

#endif

}  // namespace
}  // namespace convoxel
