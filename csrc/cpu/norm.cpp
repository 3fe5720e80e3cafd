// Batch, instance, group and layer norm:  y = (x - mean) / sqrt(var + eps) * w + b, and with
// h = (x - mean) r, r = 1 / sqrt(var + eps), g = dy w and means over what shares a mean:
//
//   dx = r (g - mean(g) - h mean(g h)),  dw = sum dy h,  db = sum dy
#include "norm_pass.h"
#include "norm_rows.h"

namespace convoxel {
namespace {

template <class S>
void forward(const NormCall& call) {
  if (rows_suffice(call)) return rows_forward<S>(call);
  const Pass<S> f(call);
  auto first = [&](int64_t plane, int64_t segment, int thread) { f.first_moments(plane, segment, thread); };
  auto combine = [&](int64_t s) { f.combine_moments(s); };
  auto last = [&](int64_t plane, int64_t segment, int thread) { f.write_y(plane, segment, thread); };
  if (call.fixed) each_segment(f.p, call.threads, false, last);
  else in_steps(f.g, f.p, f.unit_bytes(), call.threads, first, combine, last);
}

template <class S>
void backward(const NormCall& call) {
  if (rows_suffice(call)) return rows_backward<S>(call);
  const Pass<S> f(call);
  auto first = [&](int64_t plane, int64_t segment, int thread) {
    if (call.dw || !call.fixed) f.first_sums(plane, segment, thread);
  };
  auto combine = [&](int64_t s) {
    if (call.dw || !call.fixed) f.combine_sums(s);
  };
  auto last = [&](int64_t plane, int64_t segment, int thread) {
    if (!call.dx) return;
    if (call.fixed) f.write_fixed_dx(plane, segment, thread);
    else f.write_dx(plane, segment, thread);
  };
  in_steps(f.g, f.p, 2 * f.unit_bytes(), call.threads, first, combine, last);
  if (call.dw) f.write_dw();
}

template <class S>
int64_t scratch(const NormCall& call) {
  return rows_suffice(call) ? rows_scratch<S>(call) : Pass<S>(call).bytes();
}

template <class S>
constexpr Norm entries() {
  return {forward<S>, backward<S>, scratch<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const Norm norm[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
