// Depthwise weight gradient, one input channel a group:
//   dw[k, t] = sum over images n and outputs o of dy[n, k, o] * x[n, c(k), o * stride + t * dilation - padding].
//
// An item sums a piece of the outputs of some channels into a panel; the panels are added in order, so the bits are
// the same for every number of threads.
#include "depthwise_channels_weight.h"
#include "depthwise_voxels_weight.h"
#include "tables.h"

namespace convoxel {
namespace {

template <class S>
void run(const ConvCall& call) {
  if (by_channels<S>(call.g)) return channel_weight_grad<S>(call);
  voxel_weight_grad(make_voxel_weight_plan<Compute<S>>(call.g), view_x<S>(call), view_y<S>(call),
                    static_cast<S*>(call.w), static_cast<char*>(call.scratch), team(call.g, call.threads));
}

template <class S>
int64_t scratch_bytes(const ConvGeometry& g, int threads) {
  if (by_channels<S>(g)) return channel_weight_bytes<S>(g, threads);
  return voxel_weight_bytes<Compute<S>>(make_voxel_weight_plan<Compute<S>>(g), threads);
}

template <class S>
constexpr ConvKernel entry() {
  return {run<S>, scratch_bytes<S>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvKernel conv_depthwise_weight[kDTypes] = {entry<float>(), entry<bfloat16>(), entry<double>()};
}

}  // namespace convoxel
