// Activations, and the three loops of norm + addition + activation over a matrix [rows, width] (norm_tile.h):
//
//   z = (x - m) a + b (+ r),  y = act(z),  dz = dy act'(z)
//
// z is computed again in the gradient's two loops, from the same constants by the same operations: same bits.
#pragma once
#include "norm_tile.h"
#include "simd_math.h"

namespace convoxel {
namespace {

enum ActKind : int { kLeaky = 0, kRelu, kElu, kSilu, kGelu, kGeluTanh };  // ops/norm_act.py numbers them too

// s: the slope (leaky relu, prelu; 1: identity) or alpha (elu) of a column. Gradients at 0 are torch's.
template <class A>
struct Leaky {
  static Vec<A> value(Vec<A> z, Vec<A> s) { return z > Vec<A>{} ? z : z * s; }
  static Vec<A> grad(Vec<A> z, Vec<A> s, Vec<A> dy) { return z > Vec<A>{} ? dy : dy * s; }
};
template <class A>
struct Relu {  // not a slope of 0: -inf becomes 0
  static Vec<A> value(Vec<A> z, Vec<A>) { return z <= Vec<A>{} ? Vec<A>{} : z; }
  static Vec<A> grad(Vec<A> z, Vec<A>, Vec<A> dy) { return z <= Vec<A>{} ? Vec<A>{} : dy; }
};

template <class A>
struct Elu {  // z > 0 ? z : s (exp(z) - 1)
  static Vec<A> value(Vec<A> z, Vec<A> s) { return z > Vec<A>{} ? z : s * expm1<A>(z); }
  static Vec<A> grad(Vec<A> z, Vec<A> s, Vec<A> dy) { return z > Vec<A>{} ? dy : dy * s * exp<A>(z); }
};
template <class A>
struct Silu {  // z sigmoid(z)
  static Vec<A> value(Vec<A> z, Vec<A>) { return z / (1 + exp<A>(-z)); }
  static Vec<A> grad(Vec<A> z, Vec<A>, Vec<A> dy) {
    Sigmoid<A> s = sigmoid<A>(z);
    return dy * (s.p + z * s.p * s.rest);
  }
};
template <class A>
struct Gelu {  // z Phi(z)
  static Vec<A> value(Vec<A> z, Vec<A>) { return z * normal<A>(z).below; }
  static Vec<A> grad(Vec<A> z, Vec<A>, Vec<A> dy) {
    Normal<A> n = normal<A>(z);
    return dy * (n.below + z * n.density);
  }
};
template <class A>
struct GeluTanh {  // z sigmoid(2 a), a = sqrt(2 / pi) (z + 0.044715 z^3): (1 + tanh(a)) / 2 without the cancellation
  static constexpr A k = A(1.5957691216057308), cubic = A(0.044715), most = 40;  // of z, whose cube stays finite
  static Vec<A> clamp(Vec<A> z) {
    z = z > most ? broadcast(most) : z;
    return z < -most ? broadcast(-most) : z;
  }
  static Vec<A> twice_a(Vec<A> z) { return k * (z + cubic * z * z * z); }
  static Vec<A> value(Vec<A> z, Vec<A>) { return z / (1 + exp<A>(-twice_a(clamp(z)))); }
  static Vec<A> grad(Vec<A> z, Vec<A>, Vec<A> dy) {
    Vec<A> t = clamp(z);
    Sigmoid<A> s = sigmoid<A>(twice_a(t));
    return dy * (s.p + z * s.p * s.rest * (k * (1 + 3 * cubic * t * t)));
  }
};

// Constants of the columns: of z as above, and r = 1 / standard deviation; s of the activation.
template <class A>
struct ActColumns {
  const A *m, *a, *b, *s, *r;
};
// What the loops read; residual: nullptr for none.
template <class S>
struct ActInputs {
  const S *x, *residual, *dy;
};

template <int V, class S, class W = Vec<Compute<S>>>
inline W pre_activation(const ActInputs<S>& in, int64_t at, int n, W x, W m, W a, W b) {
  W z = (x - m) * a + b;
  return in.residual ? z + part<V>(in.residual + at, n) : z;
}

// y = act(z); large: past the caches
template <class Act, class S, class A>
void apply_act(const ActInputs<S>& in, S* y, int64_t rows, int64_t width, bool large, const ActColumns<A>& c) {
  constexpr int L = kLanes<A>;
  const bool past = large && width % L == 0 && streamable(y);
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], a[V()], b[V()], s[V()];
    parts<V()>(c.m + j, n, m), parts<V()>(c.a + j, n, a), parts<V()>(c.b + j, n, b), parts<V()>(c.s + j, n, s);
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < V(); ++v) {
        int64_t at = row * width + j + v * L;
        Vec<A> z = pre_activation<V()>(in, at, n, part<V()>(in.x + at, n), m[v], a[v], b[v]);
        put<V()>(y + at, Act::value(z, s[v]), n, past);
      }
  });
}

// Column sums of dz, of dz (x - m) r and, unless slopes is nullptr, of dy min(z, 0).
template <class Act, class S, class A>
void add_act_products(const ActInputs<S>& in, int64_t rows, int64_t width, const ActColumns<A>& c, double* sum,
                      double* products, double* slopes) {
  constexpr int L = kLanes<A>;
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], a[V()], b[V()], s[V()], r[V()], one[V()] = {}, two[V()] = {}, three[V()] = {};
    parts<V()>(c.m + j, n, m), parts<V()>(c.a + j, n, a), parts<V()>(c.b + j, n, b);
    parts<V()>(c.s + j, n, s), parts<V()>(c.r + j, n, r);
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < V(); ++v) {
        int64_t at = row * width + j + v * L;
        Vec<A> x = part<V()>(in.x + at, n), dy = part<V()>(in.dy + at, n);
        Vec<A> z = pre_activation<V()>(in, at, n, x, m[v], a[v], b[v]), dz = Act::grad(z, s[v], dy);
        one[v] += dz;
        two[v] += dz * ((x - m[v]) * r[v]);
        if (slopes) three[v] += z > Vec<A>{} ? Vec<A>{} : z * dy;
      }
    add<V(), A>(one, n, sum + j);
    add<V(), A>(two, n, products + j);
    if (slopes) add<V(), A>(three, n, slopes + j);
  });
}

// dx = dz a + (x - m) r p + q, or dz a where p is nullptr, and dresidual = dz; nullptr: not wanted
template <class Act, class S, class A>
void apply_act_grad(const ActInputs<S>& in, S* dx, S* dresidual, int64_t rows, int64_t width, bool large,
                    const ActColumns<A>& c, const A* p_, const A* q_) {
  constexpr int L = kLanes<A>;
  const bool whole = large && width % L == 0, past = whole && dx && streamable(dx);
  const bool residual_past = whole && dresidual && streamable(dresidual);
  strips<A>(width, [&](auto V, int64_t j, int n) {
    Vec<A> m[V()], a[V()], b[V()], s[V()], r[V()], p[V()] = {}, q[V()] = {};
    parts<V()>(c.m + j, n, m), parts<V()>(c.a + j, n, a), parts<V()>(c.b + j, n, b);
    parts<V()>(c.s + j, n, s), parts<V()>(c.r + j, n, r);
    if (p_) parts<V()>(p_ + j, n, p), parts<V()>(q_ + j, n, q);
    for (int64_t row = 0; row < rows; ++row)
      for (int v = 0; v < V(); ++v) {
        int64_t at = row * width + j + v * L;
        Vec<A> x = part<V()>(in.x + at, n), dy = part<V()>(in.dy + at, n);
        Vec<A> z = pre_activation<V()>(in, at, n, x, m[v], a[v], b[v]), dz = Act::grad(z, s[v], dy);
        if (dresidual) put<V()>(dresidual + at, dz, n, residual_past);
        if (!dx) continue;
        Vec<A> g = dz * a[v];
        put<V()>(dx + at, p_ ? g + ((x - m[v]) * r[v] * p[v] + q[v]) : g, n, past);
      }
  });
}

}  // namespace
}  // namespace convoxel
