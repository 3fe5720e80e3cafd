// Compiled without special flags: this file runs on every CPU and decides what else may run.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace convoxel {

namespace baseline {
extern const Kernels kernels;
}
#ifdef CONVOXEL_HAS_avx2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef CONVOXEL_HAS_avx512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef CONVOXEL_HAS_avx512bf16
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> available_isas() {
  std::vector<const Kernels*> isas = {&baseline::kernels};
#ifdef CONVOXEL_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    isas.push_back(&avx2::kernels);
#endif
#ifdef CONVOXEL_HAS_avx512
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("fma");
  if (avx512) isas.push_back(&avx512::kernels);
#ifdef CONVOXEL_HAS_avx512bf16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back(&avx512bf16::kernels);
#endif
#endif
  return isas;
}

static const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* k : available_isas()) {
    if (name == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("ISA '" + name + "' is not available: this build on this CPU has " + names +
                              "; unset CONVOXEL_ISA to take the best");
}

static std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* wanted = std::getenv("CONVOXEL_ISA");
    return wanted && *wanted ? find(wanted) : available_isas().back();
  }();
  return kernels;
}

const Kernels& active_isa() { return *active().load(); }

void set_isa(const std::string& name) { active().store(find(name)); }

}  // namespace convoxel
