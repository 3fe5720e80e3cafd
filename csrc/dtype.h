// Storage types. dtype is storage only: float and bfloat16 compute in float, double in double.
#pragma once
#include <cstdint>

namespace convoxel {

struct bfloat16 {
  uint16_t bits;
};

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2, kDTypes = 3 };

template <class S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace convoxel
