// The kernels for x86-64 with AVX-512 (x86-64-v4).
// Standard headers come first: what follows the pragma may use instructions that the machine lacks.
#if defined(__x86_64__)
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/arguments.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif

#define CHAINZRULE_TARGET target_avx512
#define CHAINZRULE_VECTOR_BYTES 64
#define CHAINZRULE_INSTRUCTION_SET "avx512"
#include "cpu/kernels.inl"

namespace chainzrule {
const KernelTable& kernels_avx512() { return target_avx512::kTable; }
}  // namespace chainzrule

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
