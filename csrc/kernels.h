// The table of function pointers that every ISA fills in, and the plain structs that calls pass.
// Kernels allocate nothing: outputs and scratch come from the caller, who asks for the size first.
#pragma once
#include "dtype.h"
#include "geometry.h"

namespace convoxel {

// One convolution; which of the tensors is written depends on the function.
struct ConvCall {
  ConvGeometry g;
  void* x[kMostParts];  // [N, C, D, H, W], or its parts, where the algorithm takes some: direct, Winograd, AMX
  void* w;              // [K, C / groups, KD, KH, KW], contiguous where it is written
  void* b;              // [K] (forward, bias_grad), [C] (input_grad); nullptr: none
  void* y;              // [N, K, OD, OH, OW]
  void* scratch;
  int threads;
  double* moments = nullptr;  // forward: slots [N][slots][count, mean, squared deviations][K] of y as stored
};

typedef void (*ConvFunction)(const ConvCall&);
typedef int64_t (*ConvScratch)(const ConvGeometry&, int threads);  // bytes
typedef int64_t (*ConvSlots)(const ConvGeometry&);                 // of an image

// The same two by every algorithm; nullptr: not for this dtype.
struct ConvCorrelate {
  ConvFunction forward;     // y = F(x, w) + b
  ConvFunction input_grad;  // x = G(y, w) + b: also the transposed convolution
  ConvScratch forward_scratch, input_grad_scratch;
  ConvSlots slots = nullptr;  // nullptr: forward gathers no moments
};

struct ConvKernel {
  ConvFunction run;
  ConvScratch scratch;
};

// y = (x - mean) / sqrt(var + eps) * w + b over x [N, C, P]; C / groups channels of an image (of all images:
// over_batch) share a mean. w, b, dw, db [C] are of the compute type; mean and var [groups], of each image
// unless over_batch, are written by forward unless fixed. nullptr: no such tensor.
struct NormCall {
  int64_t N, C, P, groups;
  bool over_batch, fixed, last;  // last: stored as [N, P, C]
  double eps;
  const void *x, *w, *b;
  void* y;
  double *mean, *var;
  const void* dy;
  void *dx, *dw, *db;
  void* scratch;
  int threads;
};

struct Norm {
  void (*forward)(const NormCall&);
  void (*backward)(const NormCall&);
  int64_t (*scratch)(const NormCall&);  // bytes, for both
};

// y = act(z), z = norm(x) (+ residual). kind: cpu/norm_act_tile.h numbers them. slopes, dslopes [C] of the compute
// type: of the leaky kind, alpha where nullptr (identity: 1). fixed: mean and var are given to forward, and to backward
// that they do not depend on x.
struct NormActCall : NormCall {
  int kind;
  double alpha;
  const void *slopes, *residual;  // residual as x
  void *dslopes, *dresidual;
};

struct NormAct {
  void (*forward)(const NormActCall&);
  void (*backward)(const NormActCall&);
  int64_t (*scratch)(const NormActCall&);  // bytes, for both
};

// Of y [N, K, P]: the moments of its parts in slots, as ConvCall has them, and what they make together.
struct MomentsCall {
  int64_t N, K, P, groups;
  bool over_batch, last;  // last: stored as [N, P, K]
  const void* y;
  double* slots;
  int64_t of_image;    // slots
  double *mean, *var;  // [groups], of each image unless over_batch
  void* scratch;
  int threads;
};

struct Moments {
  void (*gather)(const MomentsCall&);       // y -> slots
  int64_t (*of_image)(const MomentsCall&);  // slots that `gather` fills
  int64_t (*scratch)(const MomentsCall&);   // bytes, of `gather`
  bool (*combine)(const MomentsCall&);      // slots -> mean, var; whether all are finite
};

// n adjacent elements; x is the output where relu's gradient is asked. y: or dx.
struct ActivationCall {
  int64_t n;
  bool relu;
  double slope;
  const void *x, *dy;
  void* y;
  int threads;
};

struct Activation {
  void (*forward)(const ActivationCall&);
  void (*backward)(const ActivationCall&);
};

// whole [rows, sum of bytes] from parts [rows, bytes], or with `split` the other way; parts that are nullptr are left
// out.
struct CatCall {
  int64_t rows, count;
  void* const* parts;
  const int64_t* bytes;
  void* whole;
  bool split;
  int threads;
};

typedef void (*CatFunction)(const CatCall&);

// Interpolation of x [images, D, H, W, inner]: contiguous tensors have N C images, channels-last ones inner C.
enum ResampleMode : int {  // ops/resample.py numbers them too
  kNearest = 0,
  kNearestExact = 1,
  kLinear = 2,
  kNearestVectorized = 3,  // the same two with the roundings of torch's vectorized kernels
  kNearestExactVectorized = 4,
};

struct ResampleAxis {
  int64_t in, out;
  double scale;  // scale_factor; 0: out / in
};

struct ResampleGeometry {
  int64_t images, inner;
  int mode;
  bool align_corners;
  ResampleAxis axis[kAxes];
};

struct ResampleCall {
  ResampleGeometry g;
  const void* src;
  void* dst;
  void* scratch;
  int threads;
};

struct Resample {
  void (*forward)(const ResampleCall&);                              // x -> y
  void (*input_grad)(const ResampleCall&);                           // dy -> dx
  int64_t (*forward_scratch)(const ResampleGeometry&, int threads);  // bytes
  int64_t (*input_grad_scratch)(const ResampleGeometry&, int threads);
};

// One pooling of x [N, C, D, H, W] to y [N, C, OD, OH, OW]; codes [as y] hold the tap of each maximum.
struct PoolCall {
  int64_t N, C;
  ConvAxis axis[kAxes];  // adaptive: `kernel` bounds the windows from above, stride and so on mean nothing
  bool adaptive, last;   // last: all tensors are channels-last
  bool wide;             // codes are int32, else uint8
  bool count_padding;    // averages: padding counts as voxels
  int64_t divisor;       // averages: instead of the window's size; 0: none
  void *x, *y, *codes;   // codes: nullptr for a maximum that nobody differentiates
  void* scratch;
  int threads;
};

typedef void (*PoolFunction)(const PoolCall&);

struct MaxPool {
  PoolFunction forward;                 // x -> y, codes
  PoolFunction input_grad;              // y, codes -> x
  PoolFunction pick;                    // x, codes -> y
  PoolFunction indices;                 // codes -> y, int64, flat in D H W
  int64_t (*scratch)(const PoolCall&);  // bytes, for AvgPool too
};

struct AvgPool {
  PoolFunction forward;     // x -> y
  PoolFunction input_grad;  // y -> x
};

// Score rows, of a scan's logits as windows of it give them (cpu/scores.cpp): [W][K], then the weights' sums [W].
// rows[d, h] += weights[d, h, w] * y, from the row's voxel `first` on. Strides of y in elements, of any sign; its K
// channels are adjacent.
struct ScoreAdd {
  int64_t W, K, extent[kAxes], stride[kAxes], first;
  const float *y, *weights;
  float* const* rows;
  int threads;
};

struct ScoreDivide {
  int64_t W, K, count;
  float* const* rows;
  int threads;
};

enum ScoreKind : int { kLargest = 0, kLastPositive = 1, kScores = 2 };  // inference/rows.py numbers them too

// `count` rows of the output, each `width` voxels between those of four score rows [low, high of the first axis][of the
// second], all divided: y [count, width] holds values[channel] (of one past it for kLastPositive, where values[0]
// stands for none), uint8 or, `wide`, uint16; or for kScores y [count, width, K], float.
struct ScoreOutput {
  int64_t W, K, count, width;
  const float* const* rows;  // [count][2][2]
  const float* between;      // [count][first axis, second axis]: 0 at low, 1 at high
  const int64_t *low, *high;
  const float* t;  // [width] each
  const int32_t* values;
  int kind;
  bool wide;
  void* y;
  float* scratch;
  int threads;
};

struct Scores {
  void (*add)(const ScoreAdd&);
  bool (*divide)(const ScoreDivide&);  // by the weights' sums; whether no score is NaN
  void (*output)(const ScoreOutput&);
  int64_t (*output_scratch)(int64_t W, int64_t K, int threads);  // bytes
};

struct Kernels {
  const char* isa;
  const ConvCorrelate* conv_direct;  // [kDTypes], as all that follow
  const ConvCorrelate* conv_winograd;
  const ConvCorrelate* conv_depthwise;
  const ConvCorrelate* conv_columns;
  const ConvCorrelate* conv_amx;  // bfloat16 on the ISA amx alone: elsewhere its functions are nullptr
  const ConvCorrelate* conv_voxels;
  const ConvKernel* conv_weight_grad;  // w = H(x, y)
  const ConvKernel* conv_winograd_weight;
  const ConvKernel* conv_depthwise_weight;
  const ConvKernel* conv_columns_weight;
  const ConvKernel* conv_amx_weight;
  const ConvKernel* conv_bias_grad;  // b = y summed over all but K
  const Norm* norm;
  const NormAct* norm_act;
  const Moments* moments;
  const Activation* activation;
  const Resample* resample;
  const MaxPool* max_pool;
  const AvgPool* avg_pool;
  CatFunction concatenate;  // of bytes: any dtype
  const Scores* scores;
  // Does `rounds` rounds of independent fused multiply-adds on each thread; returns the flops done.
  double (*fma_peak)(int64_t rounds, int threads);
};

}  // namespace convoxel
