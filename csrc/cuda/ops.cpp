// The fused convolution for CUDA tensors: from tensors to pointers and sizes. Built on torch's stable ABI alone.
//
// Its operator has a library of its own, since it serves what CUTLASS takes and no more; the operator of the package is
// `chainzrule_kernels::polynomial_convolution` (chainzrule_kernels/_native_cuda.py).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/convolution.h"

namespace chainzrule {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

// What CUTLASS moves at a time; a tensor that begins elsewhere is copied.
constexpr uintptr_t kAlignment = 16;

Arithmetic arithmetic_of(const Tensor& x, bool allow_tf32) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Arithmetic::bfloat16;
    case ScalarType::Half:
      return Arithmetic::float16;
    case ScalarType::Float:
      return allow_tf32 ? Arithmetic::tfloat32 : Arithmetic::float32;
    default:
      STD_TORCH_CHECK(false, "chainzrule_kernels: the fused convolution takes bfloat16, float16 and float32");
  }
}

int narrowed(int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size <= std::numeric_limits<int>::max(), "chainzrule_kernels: a size of the convolution is ", size);
  return static_cast<int>(size);
}

// (A, B, H, W) as (A, H, W, B), without moving anything.
Tensor channels_to_the_end(const Tensor& tensor) {
  return torch::stable::transpose(torch::stable::transpose(tensor, 1, 2), 2, 3);
}

Tensor channels_from_the_end(const Tensor& tensor) {
  return torch::stable::transpose(torch::stable::transpose(tensor, 2, 3), 1, 2);
}

Tensor dense(const Tensor& tensor) {
  const Tensor result = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % kAlignment == 0;
  return aligned ? result : torch::stable::clone(result);
}

// A parameter in float32, contiguous.
OptionalTensor in_float32(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return dense(tensor->scalar_type() == ScalarType::Float ? *tensor : torch::stable::to(*tensor, ScalarType::Float));
}

const float* floats(const OptionalTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// Whether the channels of feature maps (B, C, *spatial) lie side by side, as chainzrule_kernels/ops/_feature_maps.py has it.
bool channels_innermost(const Tensor& maps) { return maps.size(1) > 1 && maps.stride(1) == 1 && !maps.is_contiguous(); }

// The output matrix as a tensor (B, K, *spatial).
Tensor arranged(const Tensor& matrix, bool innermost, bool one_dimensional) {
  Tensor result = channels_from_the_end(matrix);
  if (!innermost) {
    const Integers sizes{result.size(0), result.size(1), result.size(2), result.size(3)};
    const bool same_order = result.size(1) == 1 || result.size(2) * result.size(3) == 1;
    result = same_order ? torch::stable::reshape(matrix, sizes) : torch::stable::contiguous(result);
  }
  return one_dimensional ? torch::stable::squeeze(result, 2) : result;
}

std::tuple<Tensor, Tensor, Tensor> polynomial_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                          const Tensor& coeffs, const OptionalTensor& tap_sq, Integers stride,
                                                          Integers padding, Integers dilation, bool with_norm, bool keep_s,
                                                          bool allow_tf32) {
  const bool one_dimensional = x.dim() == 3;
  STD_TORCH_CHECK(one_dimensional || x.dim() == 4, "chainzrule_kernels: expected x of shape (B, C, L) or (B, C, H, W)");
  STD_TORCH_CHECK(weight.dim() == x.dim() && weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(),
                  "chainzrule_kernels: weight does not fit x");
  for (Integers* numbers : {&stride, &padding, &dilation}) {
    STD_TORCH_CHECK(static_cast<int64_t>(numbers->size()) == x.dim() - 2,
                    "chainzrule_kernels: expected one stride, padding and dilation for each spatial dimension");
    // One dimension is two, of which the first has one position.
    if (one_dimensional) numbers->insert(numbers->begin(), numbers == &padding ? 0 : 1);
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const Arithmetic arithmetic = arithmetic_of(x, allow_tf32);

  const auto with_two_dimensions = [&](const Tensor& tensor, int64_t before) {
    return one_dimensional ? torch::stable::unsqueeze(tensor, before) : tensor;
  };
  const Tensor x_rows = dense(channels_to_the_end(with_two_dimensions(x, 2)));
  const Tensor windows = dense(channels_to_the_end(with_two_dimensions(weight, 2)));
  const OptionalTensor bias_values = in_float32(bias);
  const OptionalTensor coefficients = in_float32(coeffs);
  OptionalTensor taps;
  if (tap_sq && with_norm) {
    // (K, P, Q) or (K,)
    const bool per_position = tap_sq->dim() > 1;
    const Tensor planes = per_position ? with_two_dimensions(*tap_sq, 1) : *tap_sq;
    taps = in_float32(per_position ? torch::stable::transpose(torch::stable::transpose(planes, 0, 1), 1, 2) : planes);
  }

  Convolution c{};
  c.height = narrowed(x_rows.size(1));
  c.width = narrowed(x_rows.size(2));
  c.channels = narrowed(x_rows.size(3));
  c.filters = narrowed(windows.size(0));
  c.kernel_height = narrowed(windows.size(1));
  c.kernel_width = narrowed(windows.size(2));
  c.stride_height = narrowed(stride[0]);
  c.stride_width = narrowed(stride[1]);
  c.padding_height = narrowed(padding[0]);
  c.padding_width = narrowed(padding[1]);
  c.dilation_height = narrowed(dilation[0]);
  c.dilation_width = narrowed(dilation[1]);
  const auto out = [](int64_t size, int64_t kernel, int64_t stride_, int64_t padding_, int64_t dilation_) {
    const int64_t room = size + 2 * padding_ - dilation_ * (kernel - 1) - 1;
    STD_TORCH_CHECK(stride_ > 0 && dilation_ > 0 && room >= 0, "chainzrule_kernels: the window is larger than the padded x");
    return narrowed(room / stride_ + 1);
  };
  c.out_height = out(c.height, c.kernel_height, c.stride_height, c.padding_height, c.dilation_height);
  c.out_width = out(c.width, c.kernel_width, c.stride_width, c.padding_width, c.dilation_width);
  c.weight = windows.const_data_ptr();
  c.bias = floats(bias_values);
  c.coefficients = floats(coefficients);
  c.degree = narrowed(coeffs.size(0)) - 1;
  c.per_channel = coeffs.dim() == 2;
  c.tap_sq = floats(taps);
  c.tap_sq_per_position = taps && tap_sq->dim() > 1;
  STD_TORCH_CHECK(!bias || bias->numel() == c.filters, "chainzrule_kernels: bias has the wrong shape");
  STD_TORCH_CHECK(!c.per_channel || coeffs.size(1) == c.filters, "chainzrule_kernels: coeffs has the wrong shape");
  const int64_t positions = int64_t{c.out_height} * c.out_width;
  STD_TORCH_CHECK(!taps || taps->numel() == (c.tap_sq_per_position ? positions : 1) * c.filters,
                  "chainzrule_kernels: tap_sq has the wrong shape");

  const int64_t batch = x.size(0);
  const Integers sizes{batch, c.out_height, c.out_width, c.filters};
  const Tensor y = torch::stable::new_empty(x, sizes);
  const Tensor s = torch::stable::new_empty(x, keep_s ? sizes : Integers{0});
  const Tensor jac_sq = torch::stable::new_empty(x, {with_norm ? batch : 0}, ScalarType::Float);
  const int tiles = (c.filters + columns_of_tile(c.filters) - 1) / columns_of_tile(c.filters);
  const int64_t rows = batch * positions;
  const Tensor row_sums = torch::stable::new_empty(x, {with_norm ? tiles * rows : 0}, ScalarType::Float);
  c.row_sums_stride = rows;

  // As many samples at a time as the iterators can count.
  const auto item = static_cast<int64_t>(x.element_size());
  const int64_t x_sample = int64_t{c.height} * c.width * c.channels;
  const int64_t y_sample = positions * c.filters;
  const int64_t samples = std::max<int64_t>(1, (kMaxTensorBytes - 1) / (std::max({x_sample, y_sample, int64_t{1}}) * item));
  for (int64_t first = 0; first < batch; first += samples) {
    c.batch = narrowed(std::min(samples, batch - first));
    c.x = static_cast<const char*>(x_rows.const_data_ptr()) + first * x_sample * item;
    c.y = static_cast<char*>(y.mutable_data_ptr()) + first * y_sample * item;
    c.s = keep_s ? static_cast<char*>(s.mutable_data_ptr()) + first * y_sample * item : nullptr;
    c.row_sums = with_norm ? static_cast<float*>(row_sums.mutable_data_ptr()) + first * positions : nullptr;
    const char* error = convolve(arithmetic, c, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == nullptr, "chainzrule_kernels: ", error);
  }
  if (with_norm) {
    const char* error = sum_samples(static_cast<const float*>(row_sums.const_data_ptr()), rows, tiles, batch, positions,
                                    static_cast<float*>(jac_sq.mutable_data_ptr()), static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == nullptr, "chainzrule_kernels: ", error);
  }
  const bool innermost = channels_innermost(x) || channels_innermost(weight);
  return {arranged(y, innermost, one_dimensional), jac_sq, keep_s ? arranged(s, innermost, one_dimensional) : s};
}

}  // namespace
}  // namespace chainzrule

STABLE_TORCH_LIBRARY(chainzrule_kernels_cuda, library) {
  library.def(
      "polynomial_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor coeffs, Tensor? tap_sq, int[] stride, int[] padding, "
      "int[] dilation, bool with_norm, bool keep_s, bool allow_tf32) -> (Tensor y, Tensor jac_sq, Tensor s)");
}

STABLE_TORCH_LIBRARY_IMPL(chainzrule_kernels_cuda, CUDA, library) {
  library.impl("polynomial_convolution", TORCH_BOX(&chainzrule::polynomial_convolution));
}
