// What follows a network that was run over windows of a scan: their logits blended, and labels on the scan's own grid.
//
// A score row is a line of voxels along the last axis: [W][K] sums of weight * logit, then [W] sums of weights. Rows
// lie anywhere, so that those which are finished can be given back while others are still being added to.
#include "simd.h"
#include "tables.h"

namespace convoxel {
namespace {

typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kLanesF = kLanes<float>;

inline Vec<float> some(const float* p, int n) { return n == kLanesF ? load(p) : load(p, n); }
inline void put(float* p, Vec<float> v, int n) { n == kLanesF ? store(p, v) : store(p, v, n); }

// f(first, lanes): the K channels of a voxel.
template <class F>
inline void channels(int64_t K, const F& f) {
  for (int64_t k = 0; k < K; k += kLanesF) f(k, int(min(kLanesF, K - k)));
}

void add(const ScoreAdd& c) {
  parallel_for(c.threads, c.extent[0] * c.extent[1], [&](int64_t i, int) {
    const float* y = c.y + i / c.extent[1] * c.stride[0] + i % c.extent[1] * c.stride[1];
    const float* g = c.weights + i * c.extent[2];
    float *scores = c.rows[i] + c.first * c.K, *sums = c.rows[i] + c.W * c.K + c.first;
    for (int64_t x = 0; x < c.extent[2]; ++x, y += c.stride[2], scores += c.K) {
      const Vec<float> weight = broadcast(g[x]);
      channels(c.K, [&](int64_t k, int n) { put(scores + k, some(scores + k, n) + weight * some(y + k, n), n); });
      sums[x] += g[x];
    }
  });
}

// Whether no score is NaN.
bool divide(const ScoreDivide& c) {
  int64_t bad = 0;
  parallel_for(c.threads, c.count, [&](int64_t i, int) {
    float *scores = c.rows[i], *sums = scores + c.W * c.K;
    VecI32 nan{};
    for (int64_t x = 0; x < c.W; ++x, scores += c.K) {
      const Vec<float> sum = broadcast(sums[x]);
      channels(c.K, [&](int64_t k, int n) {
        Vec<float> mean = some(scores + k, n) / sum;
        nan |= mean != mean;
        put(scores + k, mean, n);
      });
    }
    for (int64_t lane = 0; lane < kLanesF; ++lane)
      if (nan[lane]) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
  });
  return !bad;
}

// What lies between a and b, t in [0, 1): a itself at 0, even beside a b that is infinite.
inline void mix(const float* a, const float* b, float t, int64_t n, float* y) {
  const Vec<float> near = broadcast(1 - t), far = broadcast(t);
  for (int64_t i = 0; i < n; i += kLanesF) {
    const int lanes = int(min(kLanesF, n - i));
    put(y + i, near * some(a + i, lanes) + far * some(b + i, lanes), lanes);
  }
}

// a and b mixed, in y; or the one that it comes to.
inline const float* mixed(const float* a, const float* b, float t, int64_t n, float* y) {
  if (t == 0 || a == b) return a;
  mix(a, b, t, n, y);
  return y;
}

template <int step = kLanes<float> / 2, class V, class F>
inline V fold(V v, const F& f) {  // every lane: f over all lanes
  if constexpr (step == 0) return v;
  else {
    VecI32 from;
    for (int64_t i = 0; i < kLanesF; ++i) from[i] = int32_t(i ^ step);
    return fold<step / 2>(f(v, (V)__builtin_shuffle(v, from)), f);
  }
}

// The channels of one voxel of the output, as it lies between two of the row.
struct Between {
  const float *a, *b;
  float t;
  Vec<float> operator()(int64_t k, int n) const {
    if (t == 0) return some(a + k, n);
    return broadcast(1 - t) * some(a + k, n) + broadcast(t) * some(b + k, n);
  }
};

inline VecI32 numbers() {
  VecI32 v;
  for (int64_t i = 0; i < kLanesF; ++i) v[i] = int32_t(i);
  return v;
}

// The first of the largest channels; NaN is never the largest.
inline int32_t largest(const Between& y, int64_t K) {
  const Vec<float> lowest = broadcast(-__builtin_inff());
  const VecI32 lane = numbers();
  Vec<float> best = lowest;
  VecI32 index = lane;
  channels(K, [&](int64_t k, int n) {
    Vec<float> v = y(k, n);
    VecI32 at = lane + int32_t(k), better = (v > best) & (lane < n);
    best = better ? v : best;
    index = better ? at : index;
  });
  const Vec<float> most = fold(best, [](Vec<float> a, Vec<float> b) { return a > b ? a : b; });
  const VecI32 none = lane * 0 + INT32_MAX;
  const VecI32 first = fold(best == most ? index : none, [](VecI32 a, VecI32 b) { return a < b ? a : b; });
  return first[0] < K ? first[0] : 0;
}

// One past the last channel above zero, 0: none.
inline int32_t last_positive(const Between& y, int64_t K) {
  const VecI32 lane = numbers();
  VecI32 last{};
  channels(K, [&](int64_t k, int n) {
    Vec<float> zero{};
    last = ((y(k, n) > zero) & (lane < n)) ? lane + int32_t(k) + 1 : last;
  });
  return fold(last, [](VecI32 a, VecI32 b) { return a > b ? a : b; })[0];
}

void reduce(const ScoreOutput& c, const float* row, int64_t at) {
  for (int64_t x = 0; x < c.width; ++x) {
    const Between y{row + c.low[x] * c.K, row + c.high[x] * c.K, c.t[x]};
    if (c.kind == kScores) {
      float* to = static_cast<float*>(c.y) + (at + x) * c.K;
      channels(c.K, [&](int64_t k, int n) { put(to + k, y(k, n), n); });
      continue;
    }
    const int32_t label = c.values[c.kind == kLargest ? largest(y, c.K) : last_positive(y, c.K)];
    if (c.wide) static_cast<uint16_t*>(c.y)[at + x] = uint16_t(label);
    else static_cast<uint8_t*>(c.y)[at + x] = uint8_t(label);
  }
}

constexpr int64_t kItem =
    16;  // output rows, neighbours along the second axis: they share what is mixed along the first

int64_t output_scratch(int64_t W, int64_t K, int threads) { return 3 * W * K * threads * int64_t(sizeof(float)); }

void output(const ScoreOutput& c) {
  const int64_t n = c.W * c.K;
  parallel_for(c.threads, ceil_div(c.count, kItem), [&](int64_t item, int thread) {
    float* scratch = c.scratch + 3 * n * thread;
    const float *made[2][2] = {}, *mix_of[2] = {};  // [slot][of]: the rows that were mixed along the first axis
    float made_t[2] = {};
    auto along_first = [&](const float* a, const float* b, float t, int spare) {
      for (int s = 0; s < 2; ++s)
        if (mix_of[s] && made[s][0] == a && made[s][1] == b && made_t[s] == t) return s;
      made[spare][0] = a, made[spare][1] = b, made_t[spare] = t;
      mix_of[spare] = mixed(a, b, t, n, scratch + spare * n);
      return spare;
    };
    for (int64_t i = item * kItem; i < min(c.count, (item + 1) * kItem); ++i) {
      const float* const* r = c.rows + 4 * i;  // [low, high of the first axis][low, high of the second]
      const float tz = c.between[2 * i], ty = c.between[2 * i + 1];
      // The slot that holds this row's upper neighbour is not the one to be overwritten.
      const int upper = mix_of[0] && made[0][0] == r[1] && made[0][1] == r[3] && made_t[0] == tz;
      const int low = along_first(r[0], r[2], tz, upper ? 1 : 0);
      const int high = along_first(r[1], r[3], tz, 1 - low);
      reduce(c, mixed(mix_of[low], mix_of[high], ty, n, scratch + 2 * n), i * c.width);
    }
  });
}

}  // namespace

namespace CONVOXEL_ISA {
extern const Scores scores = {add, divide, output, output_scratch};
}

}  // namespace convoxel
