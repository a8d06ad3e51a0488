// What the binding (ops.cpp, which knows torch) hands to the convolution kernels (which know CUTLASS). Neither sees the other.
//
//   s = conv(x, W) + b,   y = p(s),   row_sums = the sums over a tile's channels of p'(s)^2 g,   g = tap_sq
//
// x is (batch, height, width, channels), W (filters, kernel_height, kernel_width, channels), y and s (batch, out_height,
// out_width, filters), g (out_height, out_width, filters), or (filters) for all positions, all contiguous. The output is also
// seen as a matrix with a row for each position of each sample and a column for each filter.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace chainzrule {

// How the products are formed. The data are bfloat16, float16, and float32 for the last two. Sums are float32 in all.
enum class Arithmetic { bfloat16, float16, tfloat32, float32 };

constexpr int kMaxDegree = 8;

struct Convolution {
  int batch, height, width, channels;
  int out_height, out_width, filters;
  int kernel_height, kernel_width;
  int padding_height, padding_width;
  int stride_height, stride_width;
  int dilation_height, dilation_width;

  const void* x = nullptr;
  const void* weight = nullptr;
  const float* bias = nullptr;  // null: none
  // Coefficient k of filter j stands at [k * filters + j], or at [k] for all.
  const float* coefficients = nullptr;
  int degree = 0;
  bool per_channel = false;
  const float* tap_sq = nullptr;  // null: g = 1
  bool tap_sq_per_position = false;

  void* y = nullptr;
  void* s = nullptr;  // null: not wanted
  // row_sums[tile * row_sums_stride + row] for tile < ceil(filters / columns_of_tile(filters)). Null: not wanted.
  float* row_sums = nullptr;
  int64_t row_sums_stride = 0;
};

// Filters that one thread block takes: half as many where that wastes less of the last block.
constexpr int columns_of_tile(int filters) { return (filters + 127) / 128 * 128 - filters >= 64 ? 64 : 128; }

// Bytes that no tensor of one launch may reach: the iterators count in 32 bits.
constexpr int64_t kMaxTensorBytes = int64_t{1} << 31;

// Whether a kernel of this arithmetic takes such a convolution: the channels' multiple, the size of W's window and of the tensors.
bool can_convolve(Arithmetic arithmetic, const Convolution& convolution);

// Starts the kernel on a stream of the current device. Returns null, or what is wrong.
const char* convolve(Arithmetic arithmetic, const Convolution& convolution, cudaStream_t stream);

// result[sample] = the sum over the tiles and over the sample's rows of row_sums, in an order that the shape fixes.
const char* sum_samples(const float* row_sums, int64_t row_sums_stride, int tiles, int64_t batch, int64_t rows_per_sample,
                        float* result, cudaStream_t stream);

// One of each for each arithmetic, in files of their own, which compile side by side.
bool can_convolve_bfloat16(const Convolution& convolution);
bool can_convolve_float16(const Convolution& convolution);
bool can_convolve_tfloat32(const Convolution& convolution);
bool can_convolve_float32(const Convolution& convolution);
const char* convolve_bfloat16(const Convolution& convolution, cudaStream_t stream);
const char* convolve_float16(const Convolution& convolution, cudaStream_t stream);
const char* convolve_tfloat32(const Convolution& convolution, cudaStream_t stream);
const char* convolve_float32(const Convolution& convolution, cudaStream_t stream);

}  // namespace chainzrule
