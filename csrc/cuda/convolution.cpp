// From the arithmetic to its kernels.

#include "cuda/convolution.h"

namespace chainzrule {

bool can_convolve(Arithmetic arithmetic, const Convolution& convolution) {
  switch (arithmetic) {
    case Arithmetic::bfloat16:
      return can_convolve_bfloat16(convolution);
    case Arithmetic::float16:
      return can_convolve_float16(convolution);
    case Arithmetic::tfloat32:
      return can_convolve_tfloat32(convolution);
    default:
      return can_convolve_float32(convolution);
  }
}

const char* convolve(Arithmetic arithmetic, const Convolution& convolution, cudaStream_t stream) {
  switch (arithmetic) {
    case Arithmetic::bfloat16:
      return convolve_bfloat16(convolution, stream);
    case Arithmetic::float16:
      return convolve_float16(convolution, stream);
    case Arithmetic::tfloat32:
      return convolve_tfloat32(convolution, stream);
    default:
      return convolve_float32(convolution, stream);
  }
}

}  // namespace chainzrule
