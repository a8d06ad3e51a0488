// The kernels for any CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/arguments.h"

#define CHAINZRULE_TARGET target_baseline
#define CHAINZRULE_VECTOR_BYTES 16
#define CHAINZRULE_INSTRUCTION_SET "baseline"
#include "cpu/kernels.inl"

namespace chainzrule {
const KernelTable& kernels_baseline() { return target_baseline::kTable; }

int activation_index(const char* name) {
  int index = 0;
  int found = -1;
  target_baseline::for_each_activation([&](auto kind) {
    if (std::strcmp(decltype(kind)::kName, name) == 0) found = index;
    ++index;
  });
  return found;
}

bool activation_is_curved(int index) {
  int current = 0;
  bool curved = true;
  target_baseline::for_each_activation([&](auto kind) {
    if (current++ == index) curved = target_baseline::kCurved<decltype(kind)>;
  });
  return curved;
}
}  // namespace chainzrule
