// Compiled without special flags: this file runs on every CPU and decides what else may run.
#include "isa.h"

#ifdef CONVOXEL_HAS_amx
#include <cpuid.h>
#endif
#if defined(CONVOXEL_HAS_amx) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef CONVOXEL_HAS_amx
namespace amx {
extern const Kernels kernels;
}

// The CPU multiplies tiles of bfloat16, and the system keeps tile registers across its switches of tasks: Linux
// hands out their state on demand, once for all threads of the process, those that run already included.
static bool tiles_granted() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBf16) == 0) return false;
  constexpr long kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
  return granted;
#else
  return false;
#endif
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
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) isas.push_back(&avx512bf16::kernels);
#ifdef CONVOXEL_HAS_amx
  if (bf16 && tiles_granted()) isas.push_back(&amx::kernels);
#endif
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
