// exp, and the normal distribution with its density, of a vector: a few units in the last place.
#pragma once
#include "simd.h"

namespace convoxel {
namespace {

template <class A>
struct ExpOf;
template <>
struct ExpOf<float> {
  typedef int32_t Int;
  static constexpr float magic = 0x1.8p23f, low = -104, high = 89;                // beyond: 0 and infinity
  static constexpr float ln2 = 0.693115234375f, rest = 0.000031946184945309417f;  // ln2 times any n is exact
  static constexpr int bits = 23, bias = 127, terms = 7;
};
template <>
struct ExpOf<double> {
  typedef int64_t Int;
  static constexpr double magic = 0x1.8p52, low = -746, high = 710;
  static constexpr double ln2 = 0.6931471803691238164901733, rest = 1.9082149292705878161e-10;
  static constexpr int bits = 52, bias = 1023, terms = 13;
};

template <class A>
struct IntVecOf {
  typedef typename ExpOf<A>::Int type __attribute__((vector_size(kVectorBytes)));
};

// exp(x) = (1 + p) s1 s2, p = exp(r) - 1 for |r| <= ln2 / 2, s1 and s2 powers of two: together they reach every
// exponent.
template <class A>
struct ExpParts {
  Vec<A> p, s1, s2;
};
template <class A, class V = Vec<A>>
inline ExpParts<A> exp_parts(V x) {
  typedef ExpOf<A> E;
  typedef typename IntVecOf<A>::type I;
  x = x < E::low ? broadcast(E::low) : x;  // NaN stays
  x = x > E::high ? broadcast(E::high) : x;
  V shifted = x * A(1.4426950408889634) + E::magic, n = shifted - E::magic;
  I k = (I)shifted - (I)broadcast(E::magic), half = k >> 1;
  V r = (x - n * E::ln2) - n * E::rest;
  A factor = 1;
  A inverse[E::terms + 1];
  for (int i = 1; i <= E::terms; ++i) inverse[i] = 1 / (factor *= A(i));
  V p = broadcast(inverse[E::terms]);
  for (int i = E::terms - 1; i >= 1; --i) p = p * r + inverse[i];
  return {p * r, (V)((half + E::bias) << E::bits), (V)((k - half + E::bias) << E::bits)};
}

template <class A, class V = Vec<A>>
inline V exp(V x) {
  ExpParts<A> e = exp_parts<A>(x);
  return (e.p * e.s1 + e.s1) * e.s2;
}
template <class A, class V = Vec<A>>
inline V expm1(V x) {  // x <= 0
  ExpParts<A> e = exp_parts<A>(x);
  V s = e.s1 * e.s2;
  return e.p * s + (s - 1);
}
// 1 / (1 + exp(-x)), and 1 minus that without cancellation.
template <class A>
struct Sigmoid {
  Vec<A> p, rest;
};
template <class A, class V = Vec<A>>
inline Sigmoid<A> sigmoid(V x) {
  V e = exp<A>(x > V{} ? -x : x), large = 1 / (1 + e), small = e * large;
  return {x > V{} ? large : small, x > V{} ? small : large};
}

// (t + k) exp(t^2 / 2) P(X > t) of the normal distribution, t >= 0, as a polynomial of u = (t - k) / (t + k): fits of
// relative error 4e-9 up to t = 15 and 2e-17 up to t = 40, by Chebyshev's nodes in 40 digits.
template <class A>
struct TailOf;
template <>
struct TailOf<float> {
  static constexpr float k = 3, most = 15;
  static constexpr float c[] = {5.5491871716794677e-5f,  1.3332395420363602e-4f, -2.4470932079177607e-4f,
                                -1.0344765508861835e-3f, 1.0241573243785498e-3f, 6.9699201509127923e-3f,
                                -1.0462288966531259e-2f, -4.726276192117602e-2f, 2.3001767667416652e-1f,
                                -5.0933198883453911e-1f, 7.2908369071397936e-1f};
};
template <>
struct TailOf<double> {
  static constexpr double k = 5, most = 40;
  static constexpr double c[] = {
      -1.8073212078146043403e-10, 1.6891057665153780829e-9,  7.6672361072026533149e-9,  -9.1445020812891738596e-9,
      -6.5848868400797397181e-8,  4.2091833338869145819e-8,  4.3298370374156094057e-7,  -3.3651220434990695011e-7,
      -2.7691457822822778648e-6,  3.9808712856669724865e-6,  1.6681160364586645435e-5,  -4.976281037790303534e-5,
      -5.9375713816471311811e-5,  5.4489906503732301149e-4,  -7.9786940073924878713e-4, -2.9933767706492681155e-3,
      2.0795066800091459633e-2,   -6.9118638706294679525e-2, 1.6502036617037502528e-1,  -3.1353315667130517141e-1,
      4.9530561596997658874e-1,   -6.6538250289005669366e-1, 7.6919304975006295804e-1};
};

// Phi(z) and phi(z).
template <class A>
struct Normal {
  Vec<A> below, density;
};
template <class A, class V = Vec<A>>
inline Normal<A> normal(V z) {
  typedef TailOf<A> T;
  V t = z < V{} ? -z : z;
  t = t > T::most ? broadcast(T::most) : t;
  V e = exp<A>(t * t * A(-0.5)), v = 1 / (t + T::k), u = 1 - (2 * T::k) * v, g = broadcast(T::c[0]);
  for (int i = 1; i < int(sizeof(T::c) / sizeof(A)); ++i) g = g * u + T::c[i];
  V tail = e * g * v;
  return {z > V{} ? 1 - tail : tail, e * A(0.3989422804014327)};
}

}  // namespace
}  // namespace convoxel
