#include "cuda/implicit_gemm.h"

namespace chainzrule {
namespace {

// x and W are rounded to TF32 (10 bits of mantissa) on their way into the tensor cores.
using Kernels = TensorCoreKernels<float, 16, cutlass::gemm::GemmShape<16, 8, 8>>::Both;

}  // namespace

bool can_convolve_tfloat32(const Convolution& convolution) { return Kernels::can_convolve(convolution); }

const char* convolve_tfloat32(const Convolution& convolution, cudaStream_t stream) {
  return Kernels::convolve(convolution, stream);
}

}  // namespace chainzrule
