// The Python module: what it was built with and for. The kernels themselves reach PyTorch through the dispatcher (ops.cpp).

#include <cuda_runtime_api.h>
#include <cutlass/version.h>

#include <string>

#include "python_module.h"

namespace py = pybind11;

namespace {

std::string version_of(int number, int thousand) {
  return std::to_string(number / thousand) + "." + std::to_string(number % thousand / (thousand / 100));
}

py::dict built_for() {
  py::dict result;
  result["architectures"] = CHAINZRULE_KERNELS_CUDA_ARCHITECTURES;
  result["cuda"] = version_of(CUDART_VERSION, 1000);
  result["cutlass"] = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." + std::to_string(CUTLASS_PATCH);
  result["torch_abi"] = chainzrule::torch_abi();
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA convolution of chainzrule_kernels.";
  module.def("built_for", &built_for, "What the module was built with and for.");
}
