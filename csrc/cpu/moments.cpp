// Mean and variance of what shares them, from the moments of parts: those that a convolution gathered while it wrote y
// (conv_moments.h), or of segments of y. All in double, in an order that no thread changes:
//
//   mean = sum n_i m_i / sum n_i,   var = sum (q_i + n_i (m_i - mean)^2) / sum n_i.
#include "norm_pass.h"

namespace convoxel {
namespace {

constexpr int64_t kShare = 16;  // channels of an item

template <class S>
Plan make_plan(const MomentsCall& call) {
  return call.last ? make_plan<S>(call.N, call.P, call.K) : make_plan<S>(call.N * call.K, call.P, 1);
}

template <class S>
int64_t of_image(const MomentsCall& call) {
  return make_plan<S>(call).segments;
}

template <class S>
int64_t scratch(const MomentsCall& call) {
  return columns_bytes<Compute<S>>(make_plan<S>(call)) * call.threads;
}

template <class S>
void gather(const MomentsCall& call) {
  typedef Compute<S> A;
  const Plan p = make_plan<S>(call);
  int64_t each = columns_bytes<A>(p);
  each_segment(p, call.threads, false, [&](int64_t plane, int64_t segment, int thread) {
    int64_t n = call.last ? plane : plane / call.K, k = call.last ? 0 : plane % call.K;
    double* to = call.slots + (n * p.segments + segment) * 3 * call.K + k;
    const S* y = static_cast<const S*>(call.y) + segment_offset(p, plane, segment);
    int64_t pixels = segment_pixels(p, segment);
    Columns<A> mine = columns<A>(p, static_cast<char*>(call.scratch) + thread * each);
    moments(p, y, pixels, mine, to + call.K, to + 2 * call.K);
    for (int64_t c = 0; c < p.channels; ++c) to[c] = double(pixels);
  });
}

// Of each channel of an image: count, mean and squared deviations into its first slot.
void combine_slots(const MomentsCall& call) {
  int64_t shares = ceil_div(call.K, kShare);
  parallel_for(call.N * shares * call.of_image > 256 ? call.threads : 1, call.N * shares, [&](int64_t item, int) {
    int64_t k = item % shares * kShare, used = min(kShare, call.K - k), step = 3 * call.K;
    double* first = call.slots + item / shares * call.of_image * step + k;
    double n[kShare] = {}, mean[kShare] = {}, q[kShare] = {};
    const double* slot = first;
    for (int64_t i = 0; i < call.of_image; ++i, slot += step)
      for (int64_t c = 0; c < used; ++c) n[c] += slot[c], mean[c] += slot[c] * slot[call.K + c];
    for (int64_t c = 0; c < used; ++c) mean[c] /= n[c];
    slot = first;
    for (int64_t i = 0; i < call.of_image; ++i, slot += step)
      for (int64_t c = 0; c < used; ++c) {
        double d = slot[call.K + c] - mean[c];
        q[c] += slot[2 * call.K + c] + slot[c] * d * d;
      }
    for (int64_t c = 0; c < used; ++c) first[c] = n[c], first[call.K + c] = mean[c], first[2 * call.K + c] = q[c];
  });
}

bool combine(const MomentsCall& call) {
  combine_slots(call);
  int64_t share = call.K / call.groups, members = call.over_batch ? call.N : 1;
  bool all = true;
  for (int64_t s = 0; s < call.groups * (call.over_batch ? 1 : call.N); ++s) {
    auto over = [&](auto f) {
      for (int64_t i = 0; i < members; ++i)
        for (int64_t c = 0; c < share; ++c)
          f(call.slots + (call.over_batch ? i : s / call.groups) * call.of_image * 3 * call.K +
            s % call.groups * share + c);
    };
    double n = 0, sum = 0, q = 0;
    over([&](const double* m) { n += m[0], sum += m[0] * m[call.K]; });
    double mean = sum / n;
    over([&](const double* m) { q += m[2 * call.K] + m[0] * (m[call.K] - mean) * (m[call.K] - mean); });
    call.mean[s] = mean, call.var[s] = q / n;
    all = all && finite(mean) && finite(q);
  }
  return all;
}

template <class S>
constexpr Moments entries() {
  return {gather<S>, of_image<S>, scratch<S>, combine};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const Moments moments[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
