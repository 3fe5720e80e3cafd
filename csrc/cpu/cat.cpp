// Concatenation, and its inverse: a row of the whole is a row of each part, side by side. Bytes, of whatever dtype.
#include "simd.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int64_t kItem = 256 * 1024;  // bytes of the whole

inline void copy(char* to, const char* from, int64_t n, bool past) {
  if (!past) {
    __builtin_memcpy(to, from, size_t(n));
    return;
  }
  constexpr int64_t lanes = kLanes<float>;
  float* y = reinterpret_cast<float*>(to);
  const float* x = reinterpret_cast<const float*>(from);
  for (int64_t i = 0; i < n / int64_t(sizeof(float)); i += lanes) stream(y + i, load(x + i));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

void cat(const CatCall& call) {
  int64_t row = 0;
  bool past = aligned(call.whole);
  for (int64_t i = 0; i < call.count; ++i) {
    row += call.bytes[i];
    past = past && aligned(call.parts[i]) && call.bytes[i] % kVectorBytes == 0;
  }
  const int64_t size = row * call.rows;
  past = past && size >= kStreamBytes;
  parallel_for(call.threads, ceil_div(size, kItem), [&](int64_t item, int) {
    int64_t at = item * kItem, end = min(size, at + kItem), r = at / row, offset = at % row, i = 0;
    while (offset >= call.bytes[i]) offset -= call.bytes[i++];
    while (at < end) {
      int64_t n = min(call.bytes[i] - offset, end - at);
      if (call.parts[i] && n) {
        char* part = static_cast<char*>(call.parts[i]) + r * call.bytes[i] + offset;
        char* whole = static_cast<char*>(call.whole) + at;
        if (call.split) copy(part, whole, n, past);
        else copy(whole, part, n, past);
      }
      at += n, offset = 0;
      if (++i == call.count) i = 0, ++r;
    }
    end_streams();
  });
}

}  // namespace

namespace CONVOXEL_ISA {
extern const CatFunction concatenate = cat;
}

}  // namespace convoxel
