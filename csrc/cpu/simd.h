// The vector of this ISA, spelled with the compiler's vector extension: one source for every
// width, and FMA wherever the flags allow it. Measured equal to intrinsics on the hot tile.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../dtype.h"

namespace convoxel {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileSums = 28;  // accumulators of a register tile: 7 x 4, with 3 + 1 of 32 registers for its operands
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileSums = 12;  // 6 x 2, with 2 + 1 of 16 registers for the operands
constexpr int kTileVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileSums = 12;
constexpr int kTileVectors = 2;
#endif
// Rows of a tile of V vectors: wide and low, for the fewest loads; a tile of one vector needs no more than two have.
constexpr int tile_rows(int V) { return kTileSums / (V > 1 ? V : 2); }

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> broadcast(A a) {
  return a - Vec<A>{};  // a + 0 would keep a real addition, because of signed zeros
}

inline float to_compute(float a) { return a; }
inline double to_compute(double a) { return a; }
inline float to_compute(bfloat16 a) {
  uint32_t bits = uint32_t(a.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline void from_compute(float a, float& s) { s = a; }
inline void from_compute(double a, double& s) { s = a; }
inline void from_compute(float a, bfloat16& s) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  s.bits = a != a ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> widen(VecU16 h) { return (Vec<float>)(__builtin_convertvector(h, VecU32) << 16); }
inline Vec<float> load(const bfloat16* p) {
  VecU16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

inline VecU16 narrow(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (VecU16)_mm512_cvtneps_pbh((__m512)v);
#else
  VecU32 bits = (VecU32)v;
  VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecU32 nan = (VecU32)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), VecU16);
#endif
}
inline void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, Vec<float> v) {
  VecU16 h = narrow(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n lanes, n <= lanes; the rest of a loaded vector is zero. (AddressSanitizer sees no masked instructions.)
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
inline Vec<float> load(const float* p, int n) { return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline Vec<double> load(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
inline Vec<float> load(const bfloat16* p, int n) {
  return widen((VecU16)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
inline void store(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v); }
inline void store(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v); }
inline void store(bfloat16* p, Vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)narrow(v));
}
#else
template <class S>
inline auto load(const S* p, int n) {
  Compute<S> lanes[kLanes<Compute<S>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_compute(p[i]);
  return load(lanes);
}
template <class S>
inline void store(S* p, Vec<Compute<S>> v, int n) {
  for (int i = 0; i < n; ++i) from_compute(v[i], p[i]);
}
#endif

constexpr int64_t kStreamBytes = 32 << 20;  // outputs of this size and more are stored past the caches

// A store past the caches, which neither reads the line first nor drives out what is still needed: for outputs too
// large to be kept until they are read. p is aligned to what is stored; `end_streams` before others look.
template <class S>
inline void stream(S* p, Vec<Compute<S>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) _mm256_stream_si256((__m256i*)p, (__m256i)narrow(v));
  else _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 2) _mm_stream_si128((__m128i*)p, (__m128i)narrow(v));
  else _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class S>
inline bool streamable(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes<Compute<S>> * sizeof(S)) == 0;
}

// Brings n elements towards the first-level cache.
template <class S>
inline void fetch(const S* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i, 0, 3);
}

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls f(item, thread) for each item. What an item is never depends on the number of threads,
// so neither do the bits of the result. The team is `threads` or 1, never between: changing
// team sizes makes libgomp end and start threads (500 us a region).
template <class F>
inline void parallel_for(int threads, int64_t items, const F& f) {
  if (threads <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) f(i, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < items; ++i) f(i, omp_get_thread_num());
#else
  for (int64_t i = 0; i < items; ++i) f(i, 0);
#endif
}

}  // namespace
}  // namespace convoxel
