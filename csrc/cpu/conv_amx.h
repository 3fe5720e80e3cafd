// bfloat16 by tiles (AMX): 16 positions x 32 channels times 32 channels x 16 output channels, products exact, sums
// in float. What the correlations and the weight gradient share: tiles, and the packing of x.
//
// A window of x lies in L2 as [block of 32 channels][D][W tap][H][W][32], padded with zeros, so that a tile of 16
// adjacent positions is 1 KB in a row for every tap. "W tap" is 1, and taps are steps along W, unless W is short.
#pragma once
#include "conv_tile.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kRows = 16;      // of every tile: positions, or pairs of channels
constexpr int64_t kChannels = 32;  // of a block of x: a row of a tile, 64 bytes
constexpr int64_t kOutputs = 32;   // of two tiles of weights
constexpr int64_t kStepWeights = kChannels * kOutputs;

// What ldtilecfg reads: all eight tiles have 16 rows of 64 bytes. In constant memory, because GCC takes the instruction
// to read the first 8 bytes alone and drops other stores before it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kTileShapes;

// The tiles' shapes belong to the thread: an item sets them and hands them back.
struct TileState {
  TileState() { _tile_loadconfig(&kTileShapes); }
  ~TileState() { _tile_release(); }
};

// The compiler does not know that tile loads read memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// Steps of bytes from one channel to the next of the same position, of one step of a sum of products.
struct Step {
  int64_t x, w;
};

// sums[P x 16][32] = sum over steps of x[positions, 32] w[32, Q x 16], for P tiles of positions. aside(i) is done while
// the tiles of step i are busy. Weights come from L2 and are loaded past L1, which then keeps x: 10 % of the time.
template <int P, int Q, class F>
inline void multiply(const Step* steps, int64_t n, const bfloat16* const* x, int64_t x_row, const bfloat16* w,
                     float* sums, const F& aside) {
  constexpr int64_t kSumRow = kOutputs * sizeof(float), kSumTile = kRows * kOutputs;
  const char *x0 = reinterpret_cast<const char*>(x[0]), *x1 = reinterpret_cast<const char*>(x[P - 1]);
  const char* weights = reinterpret_cast<const char*>(w);
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < n; ++i) {
    _tile_loadd(4, x0 + steps[i].x, x_row);
    _tile_stream_loadd(6, weights + steps[i].w, 64);
    if constexpr (Q > 1) _tile_stream_loadd(7, weights + steps[i].w + 1024, 64);
    if constexpr (P > 1) _tile_loadd(5, x1 + steps[i].x, x_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Q > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (P > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (P > 1 && Q > 1) _tile_dpbf16ps(3, 5, 7);
    aside(i);
  }
  _tile_stored(0, sums, kSumRow);
  if constexpr (Q > 1) _tile_stored(1, sums + kRows, kSumRow);
  if constexpr (P > 1) _tile_stored(2, sums + kSumTile, kSumRow);
  if constexpr (P > 1 && Q > 1) _tile_stored(3, sums + kSumTile + kRows, kSumRow);
}

typedef Vec<float> Words;  // 16 pairs of bfloat16: shuffles keep their bits

inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// Two vectors of 16 elements, interleaved: pairs of channels, as tiles of weights want them.
inline Words interleave(VecU16 even, VecU16 odd) {
  return (Words)(__builtin_convertvector(even, VecU32) | __builtin_convertvector(odd, VecU32) << 16);
}

// How an axis is packed: by its taps, each with positions of its own, or all positions that any tap reads.
inline int64_t packed_extent(const Axis& a, int64_t n, bool by_taps) { return by_taps ? a.kernel * n : extent(a, n); }

inline TileAxis place(const Axis& t, int64_t tile, bool by_taps, PackedAxis& packed) {
  if (!by_taps) return place_axis(t, tile, packed);
  int64_t begin = tile * t.tile, n = min(t.tile, t.count - begin);
  packed = {t.kernel * n, false, 0, t.in, packed.index};
  for (int64_t i = 0; i < packed.extent; ++i) packed.index[i] = -1;
  for (int64_t r = 0; r < t.phases; ++r) {
    Phase f = phase(t, r);
    for (int64_t k = 0; k < f.taps; ++k)
      for (int64_t j = 0; j < n; ++j)
        fill(packed, (f.w_first + k * t.w_tap) * n + j, (begin + j) * t.in_step + f.start + k * t.in_tap);
  }
  return {begin, n, false, 1, t.w_tap * n};
}

// Steps of a window, in positions of 32 channels.
struct Window {
  int64_t w, copies;  // positions of a row; rows along W are packed this many times
  int64_t row, copy, slice, block, blocks;
  int64_t position;  // from one to the next along W
};

inline Window window_steps(const PackedAxis* p, int64_t w, int64_t blocks) {
  Window s{w, p[kW].extent / w, w, 0, 0, 0, blocks, 1};
  s.copy = s.row * p[kH].extent, s.slice = s.copy * s.copies, s.block = s.slice * p[kD].extent;
  return s;
}

inline void zero_line(bfloat16* to) { _mm512_storeu_si512(to, _mm512_setzero_si512()); }
inline void copy_line(const bfloat16* from, bfloat16* to, __mmask32 channels) {
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(channels, from));
}

// lines [n, 32] of positions at src that are adjacent, their channels `step` apart.
inline void gather_lines(const bfloat16* src, int64_t step, int64_t channels, int64_t n, bfloat16* lines) {
  for (int64_t i = 0; i < n; i += kRows, src += kRows, lines += kRows * kChannels) {
    int64_t rows = min(kRows, n - i);
    __mmask16 some = __mmask16(first_lanes(rows));
    auto channel = [&](int64_t c) {
      return c < channels ? (VecU16)_mm256_maskz_loadu_epi16(some, src + c * step) : VecU16{};
    };
    Words r[kRows];
    for (int c = 0; c < kRows; ++c) r[c] = interleave(channel(2 * c), channel(2 * c + 1));
    transpose_block<float>(r);
    for (int64_t j = 0; j < rows; ++j) __builtin_memcpy(lines + j * kChannels, &r[j], sizeof r[j]);
  }
}

// One row of x along W, all of its channels: C of them, from `row`. lines: room for the row in one block.
inline void pack_row(const bfloat16* row, const View<bfloat16>& x, int64_t C, const PackedAxis& w, const Window& to,
                     bfloat16* out, bfloat16* lines) {
  int64_t left = 0, run = 0;
  if (w.dense) {
    left = min(w.extent, max<int64_t>(0, -w.first));
    run = max<int64_t>(0, min(w.extent, w.size - w.first) - left);
  }
  for (int64_t b = 0; b < to.blocks; ++b, out += to.block * kChannels) {
    int64_t channels = min(kChannels, C - b * kChannels), step = x.axis[kW];
    __mmask32 some = first_lanes(channels);
    const bfloat16* src = row + b * kChannels * x.c;
    if (x.c != 1) {
      int64_t from = w.dense ? w.first + left : 0;
      gather_lines(src + from, x.c, channels, w.dense ? run : w.size, lines + from * kChannels);
      src = lines, step = kChannels;
    }
    if (w.dense) {
      for (int64_t i = 0; i < left; ++i) zero_line(out + i * kChannels);
      src += (w.first + left) * step;
      bfloat16* dst = out + left * kChannels;
      for (int64_t i = 0; i < run; ++i) copy_line(src + i * step, dst + i * kChannels, some);
      for (int64_t i = left + run; i < w.extent; ++i) zero_line(out + i * kChannels);
      continue;
    }
    for (int64_t q = 0; q < to.copies; ++q)
      for (int64_t i = 0; i < to.w; ++i) {
        int64_t at = w.index[q * to.w + i];
        bfloat16* dst = out + (q * to.copy + i) * kChannels;
        if (at < 0) zero_line(dst);
        else copy_line(src + at * step, dst, some);
      }
  }
}

// The slices from `first` on of a window, of image n.
inline void pack_slices(const View<bfloat16>& x, int64_t n, int64_t C, const PackedAxis* p, const Window& to,
                        int64_t first, bfloat16* window, bfloat16* lines) {
  for (int64_t d = first; d < p[kD].extent; ++d)
    for (int64_t h = 0; h < p[kH].extent; ++h) {
      bfloat16* out = window + (d * to.slice + h * to.row) * kChannels;
      int64_t id = p[kD].index[d], ih = p[kH].index[h];
      if (id >= 0 && ih >= 0) {
        pack_row(x.data + n * x.n + id * x.axis[kD] + ih * x.axis[kH], x, C, p[kW], to, out, lines);
        continue;
      }
      for (int64_t b = 0; b < to.blocks; ++b)
        for (int64_t q = 0; q < to.copies; ++q) zero(out + (b * to.block + q * to.copy) * kChannels, to.w * kChannels);
    }
}

inline void pack_slices(const Joined<bfloat16>& x, int64_t n, int64_t C, const PackedAxis* p, const Window& to,
                        int64_t first, bfloat16* window, bfloat16* lines) {
  for_parts(x, 0, C, [&](const View<bfloat16>& part, int64_t, int64_t channels, int64_t from) {
    Window blocks = to;
    blocks.blocks = ceil_div(channels, kChannels);
    pack_slices(part, n, channels, p, blocks, first, window + from * to.block, lines);
  });
}

// Brings the slices of x that come next into L2, a line at a time, while tiles are multiplied: runs of whole rows along
// W, of one channel each where x is contiguous.
struct Ahead {
  const Joined<bfloat16>* x = nullptr;
  int64_t n = 0, first = 0, slices = 0, rows = 0, W = 0;  // rows: along H of a slice
  const int64_t* index = nullptr;                         // of rows
  int64_t channels = 0, row = 0, runs = 0, run_bytes = 0;
  int part = -1;
  const char *at = nullptr, *end = nullptr;

  Ahead() {}
  Ahead(const Joined<bfloat16>& x, int64_t n, int64_t first, int64_t slices, const PackedAxis& h, int64_t W)
      : x(&x), n(n), first(first), slices(slices), rows(h.extent), W(W), index(h.index) {}

  bool next_part() {
    if (!x || part + 1 >= x->count) return false;
    ++part, row = 0;
    const View<bfloat16>& v = x->part[part];
    channels = v.c == 1 ? 1 : x->end[part] - (part ? x->end[part - 1] : 0);
    runs = slices * rows * channels;
    run_bytes = W * (v.c == 1 ? v.axis[kW] : 1) * int64_t(sizeof(bfloat16));
    return runs > 0;
  }
  void fetch() {
    if (at >= end) {
      if (row >= runs && !next_part()) return;
      const View<bfloat16>& v = x->part[part];
      int64_t h = index[row / channels % rows];
      at = reinterpret_cast<const char*>(v.data + n * v.n + (first + row / channels / rows) * v.axis[kD] +
                                         max<int64_t>(0, h) * v.axis[kH] + row % channels * v.c);
      end = at + (h < 0 ? 0 : run_bytes), ++row;
      if (h < 0) return;
    }
    _mm_prefetch(at, _MM_HINT_T1);
    at += 64;
  }
};

// Slices that the window of this slab shares with the one before move to its front; how many: 0 if none.
inline int64_t carry_slices(const PackedAxis& before, const PackedAxis& d, const Window& steps, const Window& old,
                            bfloat16* window) {
  if (!before.dense || !d.dense || d.first <= before.first) return 0;
  int64_t shift = d.first - before.first, kept = min(before.extent - shift, d.extent);
  if (kept <= 0) return 0;
  for (int64_t b = 0; b < steps.blocks; ++b)
    __builtin_memmove(window + b * steps.block * kChannels, window + (b * old.block + shift * old.slice) * kChannels,
                      size_t(kept * steps.slice * kChannels) * sizeof(bfloat16));
  return kept;
}

#endif

}  // namespace
}  // namespace convoxel
