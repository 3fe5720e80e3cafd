// relu and leaky relu, elementwise over adjacent elements, and the gradient of both.
#include "simd.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int64_t kItem = 64 * 1024;  // elements

// y[i ..] = f(i, n) for every vector; n lanes count.
template <class S, class F>
void each_vector(S* y, int64_t n, int threads, const F& f) {
  typedef Compute<S> A;
  constexpr int L = kLanes<A>;
  const std::integral_constant<int, L> whole;
  const bool past = n * int64_t(sizeof(S)) >= kStreamBytes && streamable(y);
  parallel_for(threads, ceil_div(n, kItem), [&](int64_t item, int) {
    int64_t i = item * kItem, end = min(n, i + kItem);
    if (past) {
      for (; i + L <= end; i += L) stream(y + i, f(i, whole));
      end_streams();
    }
    for (; i + L <= end; i += L) store(y + i, f(i, whole));
    if (i < end) store(y + i, f(i, int(end - i)), int(end - i));
  });
}

template <class S>
inline Vec<Compute<S>> read(const S* p, std::integral_constant<int, kLanes<Compute<S>>>) {
  return load(p);
}
template <class S>
inline Vec<Compute<S>> read(const S* p, int n) {
  return load(p, n);
}

// y = x > 0 ? x : x * slope. relu: y = x > 0 ? x : 0, and NaN stays NaN.
template <class S>
void forward(const ActivationCall& call) {
  typedef Compute<S> A;
  const S* x = static_cast<const S*>(call.x);
  S* y = static_cast<S*>(call.y);
  Vec<A> slope = broadcast(A(call.slope)), zero{};
  if (call.relu)
    each_vector(y, call.n, call.threads, [&](int64_t i, auto n) {
      Vec<A> v = read(x + i, n);
      return v <= zero ? zero : v;
    });
  else
    each_vector(y, call.n, call.threads, [&](int64_t i, auto n) {
      Vec<A> v = read(x + i, n);
      return v > zero ? v : v * slope;
    });
}

// dx = x > 0 ? dy : dy * slope. relu: dx = x <= 0 ? 0 : dy, x being its output.
template <class S>
void backward(const ActivationCall& call) {
  typedef Compute<S> A;
  const S *x = static_cast<const S*>(call.x), *dy = static_cast<const S*>(call.dy);
  S* dx = static_cast<S*>(call.y);
  Vec<A> slope = broadcast(A(call.slope)), zero{};
  if (call.relu)
    each_vector(dx, call.n, call.threads, [&](int64_t i, auto n) {
      Vec<A> g = read(dy + i, n);
      return read(x + i, n) <= zero ? zero : g;
    });
  else
    each_vector(dx, call.n, call.threads, [&](int64_t i, auto n) {
      Vec<A> g = read(dy + i, n);
      return read(x + i, n) > zero ? g : g * slope;
    });
}

template <class S>
constexpr Activation entries() {
  return {forward<S>, backward<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const Activation activation[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
