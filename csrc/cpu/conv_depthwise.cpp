// Depthwise convolution, one input channel a group: forward F(x, w) and input gradient G(dy, w), both as the
// correlation of conv_axis.h, with vectors of channels or of voxels.
#include "depthwise_channels.h"
#include "depthwise_voxels.h"
#include "tables.h"

namespace convoxel {
namespace {

template <class S, bool transposed>
void run(const ConvCall& call) {
  View<S> x = view_x<S>(call), y = view_y<S>(call);
  const View<S>&from = transposed ? y : x, &to = transposed ? x : y;
  const S *w = static_cast<const S*>(call.w), *b = static_cast<const S*>(call.b);
  char* scratch = static_cast<char*>(call.scratch);
  int threads = team(call.g, call.threads);
  if (by_channels<S>(call.g))
    correlate_channels(make_channel_plan<S>(call.g, transposed), from, from.data + call.g.N * from.n, w, b, to, scratch,
                       threads);
  else correlate_voxels(make_voxel_plan<Compute<S>>(call.g, transposed), from, w, b, to, scratch, threads);
}

template <class S, bool transposed>
int64_t scratch_bytes(const ConvGeometry& g, int threads) {
  if (by_channels<S>(g)) return channel_bytes<S>(make_channel_plan<S>(g, transposed), threads);
  return voxel_thread_bytes<Compute<S>>(make_voxel_plan<Compute<S>>(g, transposed)) * threads;
}

template <class S>
constexpr ConvCorrelate entries() {
  return {run<S, false>, run<S, true>, scratch_bytes<S, false>, scratch_bytes<S, true>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_depthwise[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
