// One geometry for every rank: 1-D and 2-D problems have unit extents in front (D, then H).
// Plain data without functions, so that every ISA's objects may share it.
#pragma once
#include <cstdint>

namespace convoxel {

enum { kD = 0, kH = 1, kW = 2, kAxes = 3, kMostParts = 4 };

// One spatial axis of a convolution: y[o] = sum_t w[t] x[o * stride + t * dilation - padding].
struct ConvAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

enum ConvAlgorithm : int {
  kDirect = 0,
  kWinograd = 1,
  kDepthwise = 2,
  kColumns = 3,
  kAmx = 4,
  kVoxels = 5
};  // as ops/route.py

// x [N, C, D, H, W], w [K, C / groups, KD, KH, KW], y [N, K, OD, OH, OW].
struct ConvGeometry {
  int64_t N, C, K, groups;
  ConvAxis axis[kAxes];
  bool x_last, y_last;        // channels-last storage of x (and dx), of y (and dy)
  int64_t parts[kMostParts];  // channels of the tensors that make x (or dx) side by side: multiples of 16 (AMX: 32) but
                              // for the last; 0: no more
  // Of w where it is read: channels-last; float beside bfloat16 tensors, to be rounded.
  bool w_last, w_float;
  ConvAlgorithm algorithm;
  int tile[kAxes];  // Winograd: outputs of a tile along each axis, 4 or 2, 1 where the kernel has one tap
};

}  // namespace convoxel
