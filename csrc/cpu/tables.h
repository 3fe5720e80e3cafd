// What each file of this folder hands to table.cpp, in the namespace of the ISA it was compiled for.
#pragma once
#include "../kernels.h"

namespace convoxel {
namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_direct[kDTypes];
extern const ConvCorrelate conv_winograd[kDTypes];
extern const ConvCorrelate conv_depthwise[kDTypes];
extern const ConvCorrelate conv_columns[kDTypes];
extern const ConvCorrelate conv_amx[kDTypes];
extern const ConvCorrelate conv_voxels[kDTypes];
extern const ConvKernel conv_weight_grad[kDTypes];
extern const ConvKernel conv_winograd_weight[kDTypes];
extern const ConvKernel conv_depthwise_weight[kDTypes];
extern const ConvKernel conv_columns_weight[kDTypes];
extern const ConvKernel conv_amx_weight[kDTypes];
extern const ConvKernel conv_bias_grad[kDTypes];
extern const Norm norm[kDTypes];
extern const NormAct norm_act[kDTypes];
extern const Moments moments[kDTypes];
extern const Activation activation[kDTypes];
extern const Resample resample[kDTypes];
extern const MaxPool max_pool[kDTypes];
extern const AvgPool avg_pool[kDTypes];
extern const CatFunction concatenate;
extern const Scores scores;
}  // namespace CONVOXEL_ISA
}  // namespace convoxel
