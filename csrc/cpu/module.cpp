// The Python module: what it was built for and which instruction set runs. The kernels themselves reach PyTorch through the
// dispatcher (ops.cpp).

#include <string>

#include "cpu/dispatch.h"
#include "python_module.h"

namespace py = pybind11;

namespace {

py::dict built_for() {
  py::dict result;
#if defined(__clang__)
  result["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  result["compiler"] = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
  result["architecture"] = "x86_64";
  result["instruction_sets"] = "avx512, avx2, baseline";
#else
  result["architecture"] = "portable";
  result["instruction_sets"] = "baseline";
#endif
  result["torch_abi"] = chainzrule::torch_abi();
#if defined(CHAINZRULE_KERNELS_SANITIZE)
  result["sanitizers"] = "address, undefined";
#endif
  return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU kernels of chainzrule_kernels.";
  // Chosen now, so that a wrong CHAINZRULE_KERNELS_INSTRUCTION_SET is an import error rather than a failure of the first call.
  chainzrule::kernels();
  module.def(
      "instruction_set", [] { return std::string(chainzrule::kernels().instruction_set); },
      "The instruction set that runs: avx512, avx2 or baseline.");
  module.def("built_for", &built_for, "What the module was built with and for.");
}
