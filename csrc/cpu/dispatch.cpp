#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace chainzrule {
namespace {

bool supported(const std::string& name) {
  if (name == "baseline") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
  if (name == "avx2") return avx2;
  if (name == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

const KernelTable& table_of(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return kernels_avx512();
  if (name == "avx2") return kernels_avx2();
#endif
  (void)name;
  return kernels_baseline();
}

const KernelTable& choose() {
  if (const char* asked = std::getenv("CHAINZRULE_KERNELS_INSTRUCTION_SET"); asked && *asked) {
    if (!supported(asked)) {
      throw std::runtime_error("CHAINZRULE_KERNELS_INSTRUCTION_SET=" + std::string(asked) +
                               ": expected one of baseline, avx2, avx512 that this CPU supports");
    }
    return table_of(asked);
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (supported(name)) return table_of(name);
  }
  return table_of("baseline");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace chainzrule
