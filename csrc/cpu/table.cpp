// Gathers this ISA's kernels into one table.
#include "simd.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int kChains = 24;  // more than latency x ports of any core so far, fewer than the registers
constexpr int kPeakChains = kVectorBytes == 64 ? kChains : 12;

double fma_peak(int64_t rounds, int threads) {
  parallel_for(threads, threads, [&](int64_t thread, int) {
    Vec<float> acc[kPeakChains], a = broadcast(0.999f + 1e-6f * float(thread)), b = broadcast(1e-3f);
#pragma GCC unroll 32
    for (int j = 0; j < kPeakChains; ++j) acc[j] = broadcast(1.0f);
    for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 32
      for (int j = 0; j < kPeakChains; ++j) {
        acc[j] = acc[j] * a + b;
        asm volatile("" : "+v"(acc[j]));
      }
  });
  return double(rounds) * threads * kPeakChains * kLanes<float> * 2;
}

#define CONVOXEL_STRING_(x) #x
#define CONVOXEL_STRING(x) CONVOXEL_STRING_(x)
constexpr char isa[] = CONVOXEL_STRING(CONVOXEL_ISA);

}  // namespace

namespace CONVOXEL_ISA {
extern const Kernels kernels = {isa,
                                conv_direct,
                                conv_winograd,
                                conv_depthwise,
                                conv_columns,
                                conv_amx,
                                conv_voxels,
                                conv_weight_grad,
                                conv_winograd_weight,
                                conv_depthwise_weight,
                                conv_columns_weight,
                                conv_amx_weight,
                                conv_bias_grad,
                                norm,
                                norm_act,
                                moments,
                                activation,
                                resample,
                                max_pool,
                                avg_pool,
                                concatenate,
                                &scores,
                                fma_peak};
}

}  // namespace convoxel
