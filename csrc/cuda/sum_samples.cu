// The second stage of the Jacobian norm: the rows' sums of each sample, in an order that the shape fixes.

#include "cuda/convolution.h"

namespace chainzrule {
namespace {

constexpr int kThreads = 256;

// One block for each sample. A thread adds every kThreads-th row of each tile in turn; the threads' sums are then added in pairs.
__global__ void sum_samples_kernel(const float* __restrict__ row_sums, int64_t row_sums_stride, int tiles,
                                   int64_t rows_per_sample, float* __restrict__ result) {
  __shared__ double sums[kThreads];
  const int64_t first = blockIdx.x * rows_per_sample;
  double sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const float* rows = row_sums + tile * row_sums_stride + first;
    for (int64_t row = threadIdx.x; row < rows_per_sample; row += kThreads) sum += rows[row];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) result[blockIdx.x] = static_cast<float>(sums[0]);
}

}  // namespace

const char* sum_samples(const float* row_sums, int64_t row_sums_stride, int tiles, int64_t batch, int64_t rows_per_sample,
                        float* result, cudaStream_t stream) {
  if (batch == 0) return nullptr;
  void* arguments[] = {&row_sums, &row_sums_stride, &tiles, &rows_per_sample, &result};
  const cudaError_t error = cudaLaunchKernel(&sum_samples_kernel, dim3(static_cast<unsigned>(batch)), dim3(kThreads),
                                             arguments, 0, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace chainzrule
