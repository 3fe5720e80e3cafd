// What the AMX weight gradient (conv_amx_weight.cpp) multiplies: x as pairs of positions, dy turned.
#pragma once
#include "conv_amx.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kStepPositions = 32;

// Unpacking keeps within quarters of a vector: half h of 16 channels has those of 8 q + 4 h + r, at 4 q + r.
inline int64_t channel_at(int64_t half, int64_t i) { return i / 4 * 8 + half * 4 + i % 4; }

inline __m512i load_line(const bfloat16* p, __mmask32 channels) { return _mm512_maskz_loadu_epi16(channels, p); }

// Two lines of x as a pair of positions: [half][16 channels][2].
inline void store_pair(__m512i a, __m512i b, bfloat16* to) {
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(to + kChannels, _mm512_unpackhi_epi16(a, b));
}

// The positions of x that one tap along W meets: n of them from `first`, `stride` apart; zeros where x has none.
inline void pack_pairs(const bfloat16* src, int64_t step, __mmask32 some, int64_t first, int64_t stride, int64_t size,
                       int64_t n, bfloat16* to) {
  int64_t begin = max<int64_t>(0, ceil_div(max<int64_t>(0, -first), stride));
  int64_t end = first < size ? min(n, (size - 1 - first) / stride + 1) : 0;
  src += first * step, step *= stride;
  auto line = [&](int64_t i) { return i >= begin && i < end ? load_line(src + i * step, some) : __m512i{}; };
  int64_t i = 0;
  for (; i < n && i < begin; i += 2) store_pair(line(i), line(i + 1), to + i * kChannels);
  for (; i + 1 < end; i += 2)
    store_pair(load_line(src + i * step, some), load_line(src + (i + 1) * step, some), to + i * kChannels);
  for (; i < n; i += 2) store_pair(line(i), line(i + 1), to + i * kChannels);
}

// 32 lines of dy, `step` apart, as two tiles [16 output channels][32 positions].
inline void turn(const bfloat16* lines, int64_t step, __mmask32 some, bfloat16* tiles) {
  Words low[kRows], high[kRows];
  for (int64_t i = 0; i < kRows; ++i) {
    __m512i a = load_line(lines + 2 * i * step, some), b = load_line(lines + (2 * i + 1) * step, some);
    low[i] = (Words)_mm512_unpacklo_epi16(a, b), high[i] = (Words)_mm512_unpackhi_epi16(a, b);
  }
  transpose_block<float>(low);
  transpose_block<float>(high);
  __builtin_memcpy(tiles, low, sizeof low);
  __builtin_memcpy(tiles + kRows * kChannels, high, sizeof high);
}

#endif

}  // namespace
}  // namespace convoxel
