// Norm, addition and activation in one pass over memory each way:
//
//   z = h w + b (+ residual),  y = act(z),  h = (x - mean) / sqrt(var + eps)
//   dz = dy act'(z): the gradient of the norm's output, of the residual, and into dx, dw, db (norm.cpp);
//   dslopes = sum dy min(z, 0)
//
// Nothing of the size of y is kept: both passes of the gradient compute z again.
#include "norm_act_tile.h"
#include "norm_pass.h"

namespace convoxel {
namespace {

template <class S, class Act>
struct ActPass : Pass<S> {
  typedef Compute<S> A;
  using Pass<S>::call, Pass<S>::g, Pass<S>::p, Pass<S>::large, Pass<S>::one, Pass<S>::two;
  const NormActCall& act;
  const S* residual;
  S* dresidual;
  const A* slopes;
  double* three;  // sums as one and two

  explicit ActPass(const NormActCall& c) : Pass<S>(c), act(c) {
    residual = static_cast<const S*>(c.residual), dresidual = static_cast<S*>(c.dresidual);
    slopes = static_cast<const A*>(c.slopes);
    three = reinterpret_cast<double*>(static_cast<char*>(c.scratch) + round_up(Pass<S>::bytes(), 8));
  }
  int64_t bytes() const { return round_up(Pass<S>::bytes(), 8) + p.planes * p.segments * p.channels * 8; }

  // k: seven constants of a column, of which this fills in five.
  ActColumns<A> constants(int64_t plane, A* const* k) const {
    each_channel(g, plane, [&](int64_t n, int64_t c, int64_t e) {
      int64_t s = mean_of(g, n, c);
      double r = rstd(call, s), a = r * this->weight(c);
      Split<A> m = split<A>(call.mean[s]);
      k[0][e] = m.high, k[1][e] = A(a), k[2][e] = A((this->b ? double(this->b[c]) : 0) - m.low * a);
      k[3][e] = slopes ? slopes[c] : A(act.alpha), k[4][e] = A(r);
    });
    for (int i = 0; i < 5; ++i) expand(p, k[i]);
    return {k[0], k[1], k[2], k[3], k[4]};
  }
  ActInputs<S> inputs(int64_t at) const {
    return {this->x + at, residual ? residual + at : nullptr, this->dy ? this->dy + at : nullptr};
  }

  void write_y(int64_t plane, int64_t segment, int thread) const {
    ActColumns<A> c = constants(plane, this->mine(thread).constant);
    this->blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      apply_act<Act>(inputs(at), this->y + at, rows, width, large, c);
    });
  }

  void first_sums(int64_t plane, int64_t segment, int thread) const {
    Columns<A> k = this->mine(thread);
    ActColumns<A> c = constants(plane, k.constant);
    zero(k.sum, p.width), zero(k.other, p.width), zero(k.spare, p.width);
    this->blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      add_act_products<Act>(inputs(at), rows, width, c, k.sum, k.other, act.dslopes ? k.spare : nullptr);
    });
    fold(p, k.sum), fold(p, k.other), fold(p, k.spare);
    int64_t to = segment_index(p, plane, segment);
    for (int64_t e = 0; e < p.channels; ++e)
      one[to + e] = k.sum[e], two[to + e] = k.other[e], three[to + e] = k.spare[e];
  }

  void write_dx(int64_t plane, int64_t segment, int thread) const {
    Columns<A> mine = this->mine(thread);
    A* const* k = mine.constant;
    ActColumns<A> c = constants(plane, k);
    if (this->dx && !call.fixed) {
      each_channel(g, plane, [&](int64_t n, int64_t ch, int64_t e) {
        int64_t s = mean_of(g, n, ch);
        double r = rstd(call, s), b = -r * this->mean_gh[s];
        k[5][e] = A(b), k[6][e] = A(-r * this->mean_g[s] - b * split<A>(call.mean[s]).low * r);
      });
      expand(p, k[5]), expand(p, k[6]);
    }
    const A *of_h = call.fixed ? nullptr : k[5], *rest = k[6];
    this->blocks(plane, segment, [&](int64_t at, int64_t rows, int64_t width) {
      S *to = this->dx ? this->dx + at : nullptr, *to_residual = dresidual ? dresidual + at : nullptr;
      apply_act_grad<Act>(inputs(at), to, to_residual, rows, width, large, c, of_h, rest);
    });
  }

  void write_dslopes() const {
    each(call.threads, g.C, [&](int64_t c) {
      double sum = 0;
      for (int64_t n = 0; n < g.N; ++n)
        for (int64_t i = 0; i < p.segments; ++i)
          sum += three[g.last ? segment_index(p, n, i) + c : segment_index(p, n * g.C + c, i)];
      static_cast<A*>(act.dslopes)[c] = A(sum);
    });
  }
};

template <class S, class Act>
void forward_as(const NormActCall& call) {
  const ActPass<S, Act> f(call);
  auto first = [&](int64_t plane, int64_t segment, int thread) { f.first_moments(plane, segment, thread); };
  auto combine = [&](int64_t s) { f.combine_moments(s); };
  auto last = [&](int64_t plane, int64_t segment, int thread) { f.write_y(plane, segment, thread); };
  if (call.fixed) each_segment(f.p, call.threads, false, last);
  else in_steps(f.g, f.p, f.unit_bytes() * (call.residual ? 2 : 1), call.threads, first, combine, last);
}

template <class S, class Act>
void backward_as(const NormActCall& call) {
  const ActPass<S, Act> f(call);
  const bool sums = call.dw || call.dslopes || (call.dx && !call.fixed);
  auto first = [&](int64_t plane, int64_t segment, int thread) {
    if (sums) f.first_sums(plane, segment, thread);
  };
  auto combine = [&](int64_t s) {
    if (sums) f.combine_sums(s);
  };
  auto last = [&](int64_t plane, int64_t segment, int thread) {
    if (call.dx || call.dresidual) f.write_dx(plane, segment, thread);
  };
  in_steps(f.g, f.p, f.unit_bytes() * (call.residual ? 3 : 2), call.threads, first, combine, last);
  if (call.dw) f.write_dw();
  if (call.dslopes) f.write_dslopes();
}

template <class S>
void forward(const NormActCall& call) {
  typedef Compute<S> A;
  switch (call.kind) {
    case kRelu:
      return forward_as<S, Relu<A>>(call);
    case kElu:
      return forward_as<S, Elu<A>>(call);
    case kSilu:
      return forward_as<S, Silu<A>>(call);
    case kGelu:
      return forward_as<S, Gelu<A>>(call);
    case kGeluTanh:
      return forward_as<S, GeluTanh<A>>(call);
    default:
      return forward_as<S, Leaky<A>>(call);
  }
}

template <class S>
void backward(const NormActCall& call) {
  typedef Compute<S> A;
  switch (call.kind) {
    case kRelu:
      return backward_as<S, Relu<A>>(call);
    case kElu:
      return backward_as<S, Elu<A>>(call);
    case kSilu:
      return backward_as<S, Silu<A>>(call);
    case kGelu:
      return backward_as<S, Gelu<A>>(call);
    case kGeluTanh:
      return backward_as<S, GeluTanh<A>>(call);
    default:
      return backward_as<S, Leaky<A>>(call);
  }
}

template <class S>
int64_t scratch(const NormActCall& call) {
  return ActPass<S, Relu<Compute<S>>>(call).bytes();
}

template <class S>
constexpr NormAct entries() {
  return {forward<S>, backward<S>, scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const NormAct norm_act[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
