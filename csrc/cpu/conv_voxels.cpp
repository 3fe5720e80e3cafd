// Convolutions to few channels, forward F(x, w) and input gradient G(dy, w), with vectors of voxels along W: the last
// layer of a network, and the gradient of its first. Vectors of output channels would be mostly empty.
//
// An item is (image, tile of the output): all sources of the tile are packed as planes, which stay in the second-level
// cache; then each output sums its taps of all of them.
#include "depthwise_voxels.h"
#include "tables.h"

namespace convoxel {
namespace {

template <class S, bool transposed>
void run(const ConvCall& call) {
  View<S> x = view_x<S>(call), y = view_y<S>(call);
  VoxelPlan p = make_voxel_plan<Compute<S>>(call.g, transposed, true);
  correlate_voxels(p, transposed ? y : x, static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                   transposed ? x : y, static_cast<char*>(call.scratch), team(call.g, call.threads));
}

template <class S, bool transposed>
int64_t scratch_bytes(const ConvGeometry& g, int threads) {
  return voxel_thread_bytes<Compute<S>>(make_voxel_plan<Compute<S>>(g, transposed, true)) * threads;
}

template <class S>
constexpr ConvCorrelate entries() {
  return {run<S, false>, run<S, true>, scratch_bytes<S, false>, scratch_bytes<S, true>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_voxels[kDTypes] = {entries<float>(), entries<bfloat16>(), entries<double>()};
}

}  // namespace convoxel
