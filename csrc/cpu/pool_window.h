// The windows of one axis, as tables, and the lanes that read and write them.
//
// A destination voxel is made from a window of source voxels. Forward, the destination is an output o
// and its window the inputs that it pools; backward, the destination is an input i and its window the
// outputs that pooled it. Both are the same loop: source = first + j * source_step, and in the same step
// the number of the tap goes from `tap` by tap_step.
#pragma once
#include "../kernels.h"
#include "simd.h"

namespace convoxel {
namespace {

struct Window {
  int64_t source, tap, count;
  // Along W only, how many destinations from here on have this window moved on evenly, or not at all.
  int64_t run, same;
};

struct Windows {  // one axis
  Window* at;     // [destinations]
  int64_t source_step, tap_step;
};

inline int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// torch's adaptive rule: [floor(o in / out), ceil((o + 1) in / out)). It is its own adjoint: the outputs
// that pool input i are those of the rule with in and out exchanged.
inline Window adaptive_window(int64_t in, int64_t out, int64_t o) {
  int64_t begin = o * in / out;
  return {begin, 0, ceil_div((o + 1) * in, out) - begin, 1, 1};
}

// Inputs o * stride - padding + t * dilation that exist.
inline Window forward_window(const ConvAxis& a, int64_t o) {
  int64_t start = o * a.stride - a.padding, tap = start < 0 ? ceil_div(-start, a.dilation) : 0;
  int64_t source = start + tap * a.dilation;
  return {source, tap, max<int64_t>(0, min(a.kernel - tap, ceil_div(a.in - source, a.dilation))), 1, 1};
}

inline Windows forward_windows(const ConvAxis& a, bool adaptive, Window* at) {
  for (int64_t o = 0; o < a.out; ++o) at[o] = adaptive ? adaptive_window(a.in, a.out, o) : forward_window(a, o);
  return {at, adaptive ? 1 : a.dilation, 1};
}

// Outputs o with o * stride + t * dilation = i + padding. The taps of one input are every period-th one,
// from the first that fits its residue; o rises as they fall.
inline Windows backward_windows(const ConvAxis& a, bool adaptive, Window* at) {
  for (int64_t i = 0; i < a.in; ++i) at[i] = adaptive ? adaptive_window(a.out, a.in, i) : Window{0, 0, 0, 1, 1};
  if (adaptive) return {at, 1, 0};
  int64_t g = gcd(a.stride, a.dilation), period = a.stride / g, step = a.dilation / g;
  for (int64_t t = 0; t < min(period, a.kernel); ++t) {
    int64_t residue = (t * a.dilation - a.padding) % a.stride, more = (a.kernel - 1 - t) / period;
    for (int64_t i = residue < 0 ? residue + a.stride : residue; i < a.in; i += a.stride) {
      int64_t o = (i + a.padding - t * a.dilation) / a.stride;  // of tap t; tap t + j period has o - j step
      if (o < 0) continue;
      int64_t last = min(more, o / step), first = ceil_div(max<int64_t>(0, o - a.out + 1), step);
      if (first <= last) at[i] = {o - last * step, t + last * period, last - first + 1, 1, 1};
    }
  }
  return {at, step, -period};
}

inline bool equal(const Window& a, const Window& b, int64_t moved) {
  return a.count == b.count && (!a.count || (a.tap == b.tap && a.source + moved == b.source));
}

// `run`: windows that move on by `source` per `dest` destinations.
inline void mark_runs(Window* at, int64_t size, int64_t dest, int64_t source) {
  for (int64_t i = size - 2; i >= 0; --i) {
    if (equal(at[i], at[i + 1], 0)) at[i].same = at[i + 1].same + 1;
    if (i + dest < size && equal(at[i], at[i + dest], source)) at[i].run = at[i + dest].run + 1;
  }
}

// Lanes ---------------------------------------------------------------------------------------------

template <class A>
using Mask = decltype(Vec<A>{} < Vec<A>{});  // an integer vector as wide as Vec<A>; codes live in it too

template <class A>
inline Mask<A> all(int64_t code) {
  return Mask<A>{} + typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type(code);
}
template <class A>
inline Mask<A> lane_numbers() {
  Mask<A> n;
  for (int i = 0; i < kLanes<A>; ++i) n[i] = i;
  return n;
}

template <class A>
inline Mask<A> load_codes(const int32_t* p) {
  int32_t codes __attribute__((vector_size(kLanes<A> * 4)));
  __builtin_memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(codes, Mask<A>);
}
template <class A>
inline Mask<A> load_codes(const uint8_t* p) {  // GCC 12 converts bytes lane by lane, or in detours
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Mask<A>)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), _mm_loadu_si128((const __m128i*)p));
  else return (Mask<A>)_mm512_maskz_cvtepu8_epi64(__mmask8(-1), _mm_loadl_epi64((const __m128i*)p));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Mask<A>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  else return (Mask<A>)_mm256_cvtepu8_epi64(_mm_loadu_si32(p));
#else
  Mask<A> codes;
  for (int i = 0; i < kLanes<A>; ++i) codes[i] = p[i];
  return codes;
#endif
}
template <class A>
inline void store_codes(int32_t* p, Mask<A> codes) {
  int32_t narrow __attribute__((vector_size(kLanes<A> * 4))) = __builtin_convertvector(codes, decltype(narrow));
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
template <class A>
inline void store_codes(uint8_t* p, Mask<A> codes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(__mmask16(-1), (__m512i)codes));
  else _mm_storel_epi64((__m128i*)p, _mm512_maskz_cvtepi64_epi8(__mmask8(-1), (__m512i)codes));
#else
  for (int i = 0; i < kLanes<A>; ++i) p[i] = uint8_t(codes[i]);
#endif
}

// The first n < lanes, without the detour through memory that would wait for byte stores to land.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
template <class A>
inline Mask<A> load_codes(const uint8_t* p, int n) {
  __m128i codes = _mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(A) == 4) return (Mask<A>)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), codes);
  else return (Mask<A>)_mm512_maskz_cvtepu8_epi64(__mmask8(-1), codes);
}
#endif
template <class A, class Code>
inline Mask<A> load_codes(const Code* p, int n) {
  Mask<A> codes{};
  for (int i = 0; i < n; ++i) codes[i] = p[i];
  return codes;
}
template <class A, class Code>
inline void store_codes(Code* p, Mask<A> codes, int n) {
  for (int i = 0; i < n; ++i) p[i] = Code(codes[i]);
}

// p[0], p[2], p[4], ... : even lanes of the first half, odd ones of the second, so that no lane lies
// behind the last one that is asked for.
template <class A>
inline Vec<A> even(Vec<A> a, Vec<A> b) {
  constexpr int L = kLanes<A>;
  Mask<A> pick;
  for (int i = 0; i < L; ++i) pick[i] = 2 * i < L ? 2 * i : 2 * i + 1;
  return __builtin_shuffle(a, b, pick);
}

// Lanes i of a and b alternate: the first (half = 0) or second L of them.
template <class A>
inline Vec<A> zip(Vec<A> a, Vec<A> b, int half) {
  constexpr int L = kLanes<A>;
  Mask<A> pick;
  for (int i = 0; i < L; ++i) pick[i] = (half * L + i) / 2 + (i & 1) * L;
  return __builtin_shuffle(a, b, pick);
}

}  // namespace
}  // namespace convoxel
