#include "cuda/implicit_gemm.h"

namespace chainzrule {
namespace {

using Kernels = TensorCoreKernels<cutlass::bfloat16_t, 32, cutlass::gemm::GemmShape<16, 8, 16>>::Both;

}  // namespace

bool can_convolve_bfloat16(const Convolution& convolution) { return Kernels::can_convolve(convolution); }

const char* convolve_bfloat16(const Convolution& convolution, cudaStream_t stream) {
  return Kernels::convolve(convolution, stream);
}

}  // namespace chainzrule
