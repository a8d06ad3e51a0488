// The choice of the instruction set, once for the process.
#pragma once

#include "cpu/arguments.h"

namespace chainzrule {

// The kernels for the best instruction set of this CPU. The environment variable CHAINZRULE_KERNELS_INSTRUCTION_SET
// (baseline, avx2, avx512) asks for another; throws std::runtime_error when the CPU or the build does not have it.
const KernelTable& kernels();

}  // namespace chainzrule
