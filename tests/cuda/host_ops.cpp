// The binding of the convolution for CPU tensors: csrc/cuda/ops.cpp as it is, under the CPU's dispatch key, on the kernels that
// run on the host.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// What a CUDA build of torch answers: the device that is current, and its default stream.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

// So little that tests with few elements need several launches.
#include "cuda/convolution.h"
#define kMaxTensorBytes (int64_t{1} << 15)

// The dispatch key, which only the registration names.
#define CUDA CPU
#include "cuda/ops.cpp"
