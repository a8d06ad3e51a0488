#include "cuda/implicit_gemm.h"

namespace chainzrule {
namespace {

// Multiply-adds in float32 and no tensor cores: three products in TF32 would come near to float32, and turn an infinite x into
// NaN. Elements move one by one, so that any number of channels and filters will do.
template <int kColumns, int kWarpColumns>
using Of = ConvolutionKernel<float, cutlass::arch::OpClassSimt, cutlass::gemm::GemmShape<128, kColumns, 8>,
                             cutlass::gemm::GemmShape<32, kWarpColumns, 8>, cutlass::gemm::GemmShape<1, 1, 1>, 4, 1, 1>;
using Kernels = ConvolutionKernels<Of<128, 64>, Of<64, 64>>;

}  // namespace

bool can_convolve_float32(const Convolution& convolution) { return Kernels::can_convolve(convolution); }

const char* convolve_float32(const Convolution& convolution, cudaStream_t stream) {
  return Kernels::convolve(convolution, stream);
}

}  // namespace chainzrule
