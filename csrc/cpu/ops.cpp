// The operators' CPU kernels: from tensors to matrices, tiles and tasks, and back. Built on torch's stable ABI alone.
//
// How the work is cut depends on the shapes only, never on the number of threads, and partial sums are added in a fixed order:
// the same input gives the same bits on one machine.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/arguments.h"
#include "cpu/dispatch.h"

namespace chainzrule {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32768;
// Columns of a forward tile where there are too few rows to keep the threads busy.
constexpr int64_t kColumnsPerSplit = 4096;
constexpr int64_t kFewRows = 32;
// Rows of a backward slab that keeps a sum for every channel: enough for the sums to be small beside the data.
constexpr int64_t kRowsPerSlab = 64;
constexpr int64_t kMaxSlabs = 64;
// Columns of a tile of images, which have long rows. Memory is read fastest from one end to the other, page after page.
constexpr int64_t kColumnsPerImageTile = 65536;
// Slabs of images that keep sums for every channel, and columns of their tiles: fewer slabs have fewer sums to add up, and narrower
// tiles still make enough tasks.
constexpr int64_t kSlabsOfImages = 4;
constexpr int64_t kColumnsPerTileOfSums = 16384;
// A backward that keeps a sum for each column of an image has narrower tiles, for the sums to stay in the cache, and as few
// slabs of images as threads can do with, since each has its own sums. Not one: the next layer's threads divide the images, too,
// and each finds its own in its cache.
constexpr int64_t kColumnsPerSummedTile = 2048;
constexpr int64_t kImagesPerSummedTile = 8;
constexpr int64_t kSlabsOfSums = 8;
// How many rows of an image there must be for each kind of them for sums by kind to be worth it.
constexpr size_t kRowsOfAKind = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DataType data_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DataType::float32;
    case ScalarType::Double:
      return DataType::float64;
    case ScalarType::BFloat16:
      return DataType::bfloat16;
    case ScalarType::Half:
      return DataType::float16;
    default:
      STD_TORCH_CHECK(false, "chainzrule_kernels: expected a float32, float64, bfloat16 or float16 tensor");
  }
}

ScalarType compute_type_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[static_cast<size_t>(i)] = tensor.size(i);
  return sizes;
}

int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

// An empty contiguous tensor. torch::stable::new_empty would look its operator up by name and box its arguments, which takes
// several times as long; these are the kernels of the CPU and have nothing to dispatch.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle result = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                           torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                           aoti_torch_device_type_cpu(), 0, &result) == 0,
                  "chainzrule_kernels: no memory for a result");
  return Tensor(result);
}

// The dispatcher is asked only where there is something to copy.
Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Tensor in_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type()); }

// Asks for huge pages under a large fresh tensor. The allocator maps such a block anew for each tensor, and taking it page by
// page costs several times as much as filling it. The advice ends with the mapping.
void prefer_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr int64_t kMappedAnew = int64_t{32} << 20;  // glibc's largest M_MMAP_THRESHOLD
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const int64_t bytes = fresh.numel() * static_cast<int64_t>(fresh.element_size());
  if (bytes < kMappedAnew) return;
  const auto data = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (data + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  // Only advice: where it is not taken, nothing is lost.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

Tensor empty_like_contiguous(const Tensor& like) {
  Tensor result = empty(sizes_of(like), like.scalar_type());
  prefer_huge_pages(result);
  return result;
}

Tensor empty_for_results(const Tensor& like, std::vector<int64_t> sizes) {
  Tensor result = empty(sizes, like.scalar_type());
  prefer_huge_pages(result);
  return result;
}

// A tensor (..., N) as a matrix of unit column stride. It is used where it lies if its leading dimensions are evenly spaced,
// and copied otherwise.
class Rows {
 public:
  Rows() = default;
  explicit Rows(const Tensor& tensor) : tensor_(tensor) {
    if (!evenly_spaced()) {
      tensor_ = as_contiguous(tensor);
      STD_TORCH_CHECK(evenly_spaced(), "chainzrule_kernels: a contiguous copy has unexpected strides");
    }
  }
  explicit Rows(const OptionalTensor& tensor) {
    if (tensor) *this = Rows(*tensor);
  }

  ConstMatrix matrix() const { return {tensor_ ? tensor_->const_data_ptr() : nullptr, row_stride_}; }

 private:
  bool evenly_spaced() {
    const Tensor& t = *tensor_;
    const int64_t last = t.dim() - 1;
    row_stride_ = t.size(last);
    if (t.numel() == 0) return true;  // nothing is read
    if (t.size(last) > 1 && t.stride(last) != 1) return false;
    bool found = false;
    int64_t expected = 0;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (!found) {
        row_stride_ = t.stride(i);
        found = true;
      } else if (t.stride(i) != expected) {
        return false;
      }
      expected = t.stride(i) * t.size(i);
    }
    return true;
  }

  OptionalTensor tensor_;
  int64_t row_stride_ = 0;
};

// A tensor (T, ..., N) as T matrices.
class TangentRows {
 public:
  TangentRows() = default;
  explicit TangentRows(const Tensor& tensor) : rows_(as_contiguous(tensor)) {
    tangent_stride_ = rows_of(tensor) / std::max<int64_t>(tensor.size(0), 1) * tensor.size(tensor.dim() - 1);
  }
  explicit TangentRows(const OptionalTensor& tensor) {
    if (tensor) *this = TangentRows(*tensor);
  }

  ConstMatrix matrix() const { return rows_.matrix(); }
  int64_t tangent_stride() const { return tangent_stride_; }

 private:
  Rows rows_;
  int64_t tangent_stride_ = 0;
};

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 0};
}

// The one number of a tensor (N,) of stride 0, N times.
Tensor repeated(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type) return as_contiguous(in_type(tensor, type));
  const Tensor result = empty({tensor.size(0)}, type);
  const void* from = tensor.const_data_ptr();
  void* to = result.mutable_data_ptr();
  if (type == ScalarType::Double) {
    std::fill_n(static_cast<double*>(to), tensor.size(0), *static_cast<const double*>(from));
  } else {
    std::fill_n(static_cast<float*>(to), tensor.size(0), *static_cast<const float*>(from));
  }
  return result;
}

// A parameter or per-sample quantity, contiguous and in the compute type.
class Parameters {
 public:
  Parameters() = default;
  Parameters(const OptionalTensor& tensor, ScalarType type) {
    if (!tensor) return;
    data_type_of(*tensor);  // refuses what is not floating
    if (tensor->dim() == 1 && tensor->stride(0) == 0 && tensor->size(0) > 1) {
      // What a sum or mean over the samples sends to their norms. The dispatcher would take longer than most kernels.
      tensor_ = repeated(*tensor, type);
    } else {
      tensor_ = as_contiguous(in_type(*tensor, type));
    }
  }
  const void* data() const { return tensor_ ? tensor_->const_data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

void check_data(const Tensor& z) {
  STD_TORCH_CHECK(z.dim() >= 1, "chainzrule_kernels: expected z of shape (..., N), got a 0-d tensor");
  data_type_of(z);
}

void check_same_shape(const char* name, const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor) return;
  STD_TORCH_CHECK(sizes_of(*tensor) == sizes_of(like), "chainzrule_kernels: ", name, " has the wrong shape");
  STD_TORCH_CHECK(tensor->scalar_type() == like.scalar_type(), "chainzrule_kernels: ", name, " has the wrong dtype");
}

void check_count(const char* name, const OptionalTensor& tensor, int64_t expected) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->numel() == expected, "chainzrule_kernels: ", name, " has the wrong shape");
}

// The scalar function, with its coefficients in the compute type.
class Function {
 public:
  Function(const Tensor& coeffs, bool rectified, const Tensor& z) : Function(coeffs, rectified, z, z.size(z.dim() - 1)) {}
  Function(const Tensor& coeffs, bool rectified, const Tensor& z, int64_t channels)
      : coefficients_(coeffs, compute_type_of(z)) {
    STD_TORCH_CHECK(coeffs.dim() == 1 || (coeffs.dim() == 2 && coeffs.size(1) == channels),
                    "chainzrule_kernels: coeffs has the wrong shape");
    STD_TORCH_CHECK(coeffs.size(0) >= 2 && coeffs.size(0) <= 9, "chainzrule_kernels: the degree must lie between 1 and 8");
    spec_.degree = static_cast<int>(coeffs.size(0)) - 1;
    spec_.per_channel = coeffs.dim() == 2;
    spec_.rectified = rectified;
    spec_.coefficients = coefficients_.data();
  }
  explicit Function(const std::string& kind) {
    spec_.activation = activation_index(kind.c_str());
    STD_TORCH_CHECK(spec_.activation >= 0, "chainzrule_kernels: there is no activation called ", kind);
  }

  const FunctionSpec& spec() const { return spec_; }

 private:
  Parameters coefficients_;
  FunctionSpec spec_;
};

// ---- the forward: tiles of whole rows, or parts of rows where there are few -----------------------------------------

// Whole channels or, where they are innermost, whole positions, so that the parameters of a tile start with the first channel; of
// larger channels whole rows of their positions.
int64_t columns_per_image_tile(const ChannelOrder& order, int64_t row, int64_t at_most = kColumnsPerImageTile) {
  int64_t unit = order.outermost ? order.positions : order.channels;
  if (order.outermost && unit > at_most) unit = row;
  unit = std::max<int64_t>(1, unit);
  return std::min(std::max<int64_t>(1, order.columns()), std::max<int64_t>(1, at_most / unit) * unit);
}

struct ForwardPlan {
  int64_t rows, columns, splits, split_width, rows_per_task, tasks;

  ForwardPlan(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    splits = rows < kFewRows && columns > kColumnsPerSplit ? ceil_div(columns, kColumnsPerSplit) : 1;
    split_width = splits > 1 ? kColumnsPerSplit : columns;
    rows_per_task = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, split_width));
    tasks = ceil_div(rows, rows_per_task) * splits;
  }
  // A row for each image; `row` of its positions are in one tile.
  ForwardPlan(int64_t rows, const ChannelOrder& order, int64_t row)
      : rows(rows),
        columns(order.columns()),
        split_width(columns_per_image_tile(order, row)),
        rows_per_task(std::max<int64_t>(1, kGrain / split_width)) {
    splits = std::max<int64_t>(1, ceil_div(columns, split_width));
    tasks = ceil_div(rows, rows_per_task) * splits;
  }

  // Calls run(tile, split) for each tile, in parallel.
  template <class Run>
  void execute(int64_t work_per_element, const Run& run) const {
    const int64_t elements = std::max<int64_t>(1, rows_per_task * split_width * work_per_element);
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task % splits;
        const int64_t row = task / splits * rows_per_task;
        const int64_t column = split * split_width;
        run(Tile{row, std::min(rows, row + rows_per_task), column, std::min(columns, column + split_width)}, split);
      }
    });
  }
};

// The norms that come in `splits` parts, added in order.
void add_splits(const std::vector<double>& partials, int64_t splits, const Tensor& norm) {
  const int64_t count = norm.numel();
  const bool wide = norm.scalar_type() == ScalarType::Double;
  void* data = norm.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += partials[static_cast<size_t>(i * splits + split)];
    if (wide) {
      static_cast<double*>(data)[i] = sum;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(sum);
    }
  }
}

// Runs the kernel on every tile and adds up the norms.
void execute_dreg_forward(DregForward& a, const ForwardPlan& plan, const OptionalTensor& norm) {
  a.splits = plan.splits;
  std::vector<double> partials;
  if (norm && plan.splits > 1) {
    partials.resize(static_cast<size_t>(plan.rows * plan.splits));
    a.norm_partials = partials.data();
  } else if (norm) {
    a.norm = norm->mutable_data_ptr();
  }
  const KernelTable& table = kernels();
  plan.execute(1, [&](const Tile& tile, int64_t split) { table.dreg_forward(a, tile, split); });
  if (!partials.empty()) add_splits(partials, plan.splits, *norm);
}

// Fills y, and where they are given norm and derivative.
void run_dreg_forward(const Tensor& z, const Function& function, const OptionalTensor& row_sq, const Tensor& y,
                      const OptionalTensor& norm, const OptionalTensor& derivative) {
  const Rows z_rows(z);
  const Parameters row_sq_values(row_sq, compute_type_of(z));
  DregForward a{};
  a.type = data_type_of(z);
  a.function = function.spec();
  a.z = z_rows.matrix();
  a.row_sq.data = row_sq_values.data();
  int64_t rows = rows_of(z);
  a.order.channels = z.size(z.dim() - 1);
  a.y = matrix_of(y);
  if (!norm && !a.function.per_channel && a.z.row_stride == a.order.channels) {
    // Nothing depends on the rows: one long row.
    a.order.channels *= rows;
    rows = 1;
  }
  if (derivative) a.derivative = matrix_of(*derivative);
  execute_dreg_forward(a, ForwardPlan(rows, a.order.channels), norm);
}

std::tuple<Tensor, Tensor, Tensor> dreg_forward(const Tensor& z, const OptionalTensor& row_sq, const Function& function,
                                                bool return_derivative) {
  check_count("row_sq", row_sq, z.size(z.dim() - 1));
  const Tensor y = empty_like_contiguous(z);
  auto norm_sizes = sizes_of(z);
  norm_sizes.pop_back();
  const Tensor norm = empty(norm_sizes, compute_type_of(z));
  const Tensor derivative = return_derivative ? empty_like_contiguous(z) : nothing(z);
  run_dreg_forward(z, function, row_sq, y, norm, return_derivative ? OptionalTensor(derivative) : std::nullopt);
  return {y, norm, derivative};
}

// ---- the backward: slabs of rows, each with its own sums for the parameters ------------------------------------------

// What a backward over images adds up over them.
enum ImageSums { kNoSums, kForChannels, kForColumns };

int64_t columns_per_tile(ImageSums sums) {
  return sums == kForColumns ? kColumnsPerSummedTile : sums == kForChannels ? kColumnsPerTileOfSums : kColumnsPerImageTile;
}

struct BackwardPlan {
  int64_t rows, columns, splits, split_width, rows_per_slab, slabs;
  bool whole_channels = false;  // each split has channels of its own

  BackwardPlan(int64_t rows, int64_t columns, bool sums_per_channel) : rows(rows), columns(columns) {
    const int64_t widest = sums_per_channel ? kColumnsPerSum : rows < kFewRows ? kColumnsPerSplit : columns;
    split_width = std::min(columns, widest);
    splits = columns > 0 ? ceil_div(columns, split_width) : 1;
    const int64_t unit = sums_per_channel ? kRowsPerSlab : std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
    rows_per_slab = ceil_div(std::max(unit, ceil_div(rows, kMaxSlabs)), unit) * unit;
    slabs = std::max<int64_t>(1, ceil_div(rows, rows_per_slab));
  }
  // A row for each image; `row` of its positions are in one tile.
  BackwardPlan(int64_t rows, const ChannelOrder& order, int64_t row, ImageSums sums)
      : rows(rows),
        columns(order.columns()),
        split_width(columns_per_image_tile(order, row, columns_per_tile(sums))),
        whole_channels(order.outermost && split_width % order.positions == 0) {
    splits = std::max<int64_t>(1, ceil_div(columns, split_width));
    switch (sums) {
      case kNoSums:
        rows_per_slab = std::max<int64_t>(1, kGrain / split_width);
        break;
      case kForChannels:
        rows_per_slab = std::max<int64_t>(1, ceil_div(rows, kSlabsOfImages));
        break;
      case kForColumns:
        rows_per_slab = std::min(std::max(kImagesPerSummedTile, ceil_div(rows, kSlabsOfSums)), kRowsPerSum);
        break;
    }
    slabs = std::max<int64_t>(1, ceil_div(rows, rows_per_slab));
  }

  // Calls run(tile, slab, split) for each tile, in parallel.
  template <class Run>
  void execute(int64_t work_per_element, const Run& run) const {
    const int64_t elements = std::max<int64_t>(1, rows_per_slab * split_width * work_per_element);
    const int64_t grain = std::max<int64_t>(1, kGrain / elements);
    torch::stable::parallel_for(0, slabs * splits, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slab = task / splits;
        const int64_t split = task % splits;
        const int64_t row = slab * rows_per_slab;
        const int64_t column = split * split_width;
        run(Tile{row, std::min(rows, row + rows_per_slab), column, std::min(columns, column + split_width)}, slab, split);
      }
    });
  }
};

// The sums of every slab and split, and the gradients of the parameters that they add up to.
class PartialSums {
 public:
  // `row_sq_per_channel` counts the gradients of row_sq that are wanted for each channel.
  PartialSums(const BackwardPlan& plan, const FunctionSpec& function, const ChannelOrder& order, bool wants_coefficients,
              int64_t row_sq_per_channel)
      : splits_(plan.splits), of_own_channels_(plan.whole_channels) {
    const bool channels_share_splits = order.sums_columns() && !plan.whole_channels;
    const int64_t coefficient_count = function.degree + 1;
    if (wants_coefficients) {
      coefficients_ = {plan, !function.per_channel || channels_share_splits,
                       function.per_channel ? coefficient_count * order.channels : coefficient_count};
    }
    if (row_sq_per_channel > 0) {
      row_sq_ = {plan, channels_share_splits, row_sq_per_channel * order.channels};
    }
  }

  GradientSums of(int64_t slab, int64_t split) const {
    return {coefficients_.of(slab, split, splits_), row_sq_.of(slab, split, splits_), nullptr, of_own_channels_};
  }

  // In the shape and dtype of the parameter; added up in the type in which an op on z computes.
  Tensor coefficient_gradient(const Tensor& coeffs, const Tensor& z) const {
    return in_type(coefficients_.added_up(sizes_of(coeffs), compute_type_of(z)), coeffs.scalar_type());
  }
  Tensor row_sq_gradient(const Tensor& row_sq, const Tensor& z) const {
    return in_type(row_sq_gradient(sizes_of(row_sq), compute_type_of(z)), row_sq.scalar_type());
  }
  Tensor row_sq_gradient(const std::vector<int64_t>& sizes, ScalarType type) const { return row_sq_.added_up(sizes, type); }

 private:
  // The sums for one parameter: of every split of every slab, or of every slab where each split fills its own columns.
  struct Sums {
    bool for_each_split = false;
    int64_t count = 0;
    int64_t parts = 0;
    std::unique_ptr<double[]> data;

    Sums() = default;
    Sums(const BackwardPlan& plan, bool for_each_split, int64_t count)
        : for_each_split(for_each_split),
          count(count),
          parts(for_each_split ? plan.slabs * plan.splits : plan.slabs),
          data(new double[static_cast<size_t>(parts * count)]) {}

    double* of(int64_t slab, int64_t split, int64_t splits) const {
      return data ? data.get() + (for_each_split ? slab * splits + split : slab) * count : nullptr;
    }

    Tensor added_up(const std::vector<int64_t>& sizes, ScalarType compute_type) const {
      const Tensor result = empty(sizes, compute_type);
      void* to = result.mutable_data_ptr();
      const KernelTable& table = kernels();
      const DataType type = data_type_of(result);
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, parts));
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        table.sum_slabs(type, data.get(), parts, count, begin, end, to);
      });
      return result;
    }
  };

  const int64_t splits_;
  const bool of_own_channels_;
  Sums coefficients_;
  Sums row_sq_;
};

// The sums for each column of every slab, in the compute type, and the gradient that they add up to.
class ColumnSums {
 public:
  ColumnSums(const BackwardPlan& plan, const std::vector<int64_t>& sizes, ScalarType compute_type)
      : slabs_(plan.slabs),
        columns_(plan.columns),
        gradient_(empty(sizes, compute_type)),
        type_(data_type_of(gradient_)),
        bytes_per_slab_(static_cast<size_t>(columns_) * static_cast<size_t>(gradient_.element_size())) {
    if (slabs_ > 1) data_.reset(new std::byte[static_cast<size_t>(slabs_) * bytes_per_slab_]);
  }

  void* of(int64_t slab) const {
    return data_ ? data_.get() + static_cast<size_t>(slab) * bytes_per_slab_ : gradient_.mutable_data_ptr();
  }

  Tensor added_up(ScalarType type) const {
    if (data_) {
      const KernelTable& table = kernels();
      void* to = gradient_.mutable_data_ptr();
      torch::stable::parallel_for(0, columns_, std::max<int64_t>(1, kGrain / slabs_), [&](int64_t begin, int64_t end) {
        table.sum_column_slabs(type_, data_.get(), slabs_, columns_, begin, end, to);
      });
    }
    return in_type(gradient_, type);
  }

 private:
  const int64_t slabs_;
  const int64_t columns_;
  const Tensor gradient_;
  const DataType type_;
  const size_t bytes_per_slab_;
  std::unique_ptr<std::byte[]> data_;  // of one slab it is the gradient
};

struct Needs {
  bool z, companion, coefficients;
};

// What a backward returns when no gradient arrives.
std::tuple<Tensor, Tensor, Tensor> zero_gradients(const Tensor& z, const OptionalTensor& companion,
                                                  const OptionalTensor& coeffs, Needs needs) {
  const auto zeros = [&](bool wanted, const OptionalTensor& like) {
    return wanted ? torch::stable::new_zeros(*like, sizes_of(*like)) : nothing(z);
  };
  return {zeros(needs.z, z), zeros(needs.companion, companion), zeros(needs.coefficients, coeffs)};
}

// Gradients of z, row_sq and coeffs (empty where not wanted; coeffs is null for an activation).
std::tuple<Tensor, Tensor, Tensor> dreg_backward(const Tensor& z, const OptionalTensor& row_sq, const Function& function,
                                                 const OptionalTensor& coeffs, const OptionalTensor& grad_y,
                                                 const OptionalTensor& grad_norm, const OptionalTensor& grad_derivative,
                                                 Needs needs) {
  const int64_t rows = rows_of(z);
  check_same_shape("grad_y", grad_y, z);
  check_same_shape("grad_derivative", grad_derivative, z);
  check_count("grad_jac_sq", grad_norm, rows);
  check_count("row_sq", row_sq, z.size(z.dim() - 1));
  const Rows z_rows(z), grad_y_rows(grad_y), grad_derivative_rows(grad_derivative);
  const Parameters row_sq_values(row_sq, compute_type_of(z)), grad_norm_values(grad_norm, compute_type_of(z));
  STD_TORCH_CHECK(row_sq || !needs.companion, "chainzrule_kernels: there is no row_sq to take a gradient of");
  if (!grad_y && !grad_norm && !grad_derivative) return zero_gradients(z, row_sq, coeffs, needs);
  const Tensor grad_z = needs.z ? empty_like_contiguous(z) : nothing(z);
  DregBackward a{};
  a.type = data_type_of(z);
  a.order.channels = z.size(z.dim() - 1);
  a.function = function.spec();
  a.z = z_rows.matrix();
  a.grad_y = grad_y_rows.matrix();
  a.grad_derivative = grad_derivative_rows.matrix();
  a.grad_norm = grad_norm_values.data();
  a.row_sq.data = row_sq_values.data();
  if (needs.z) a.grad_z = matrix_of(grad_z);
  const BackwardPlan plan(rows, a.order.channels, a.function.per_channel || needs.companion);
  const PartialSums sums(plan, a.function, a.order, needs.coefficients, needs.companion ? 1 : 0);
  const KernelTable& table = kernels();
  plan.execute(1, [&](const Tile& tile, int64_t slab, int64_t split) { table.dreg_backward(a, tile, sums.of(slab, split)); });
  return {grad_z, needs.companion ? sums.row_sq_gradient(*row_sq, z) : nothing(z),
          needs.coefficients ? sums.coefficient_gradient(*coeffs, z) : nothing(z)};
}

// ---- feature maps: a row for each image ------------------------------------------------------------------------------

Tensor with_dimension_moved(const Tensor& tensor, int64_t from, int64_t to) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(from),
                                    torch::stable::detail::from(to)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION) == 0,
                  "chainzrule_kernels: movedim failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// How feature maps (B, C, *spatial) lie in memory, and so how results lie: see ops/_feature_maps.py.
class MapLayout {
 public:
  explicit MapLayout(const Tensor& z)
      : innermost_(z.dim() > 2 && z.size(1) > 1 && z.stride(1) == 1 && !z.is_contiguous()) {
    order_.channels = z.size(1);
    for (int64_t i = 2; i < z.dim(); ++i) order_.positions *= z.size(i);
    order_.outermost = !innermost_ && order_.positions > 1;
  }

  const ChannelOrder& order() const { return order_; }
  bool channels_innermost() const { return innermost_; }

  // Maps or, with channel_dimension 0, a parameter (C, *spatial), with its dimensions in the order of memory; and back.
  Tensor in_order_of_memory(const Tensor& tensor, int64_t channel_dimension = 1) const {
    return innermost_ ? with_dimension_moved(tensor, channel_dimension, -1) : tensor;
  }
  Tensor in_order_of_schema(const Tensor& tensor, int64_t channel_dimension = 1) const {
    return innermost_ ? with_dimension_moved(tensor, -1, channel_dimension) : tensor;
  }

 private:
  const bool innermost_;
  ChannelOrder order_;
};

// Feature maps in the order of memory as a matrix. They are used where they lie if each image is without gaps, and copied
// otherwise.
class Images {
 public:
  explicit Images(const Tensor& maps) : maps_(without_gaps(maps) ? maps : as_contiguous(maps)) {}
  static Images of(const OptionalTensor& maps, const MapLayout& layout) {
    return maps ? Images(layout.in_order_of_memory(*maps)) : Images();
  }

  ConstMatrix matrix() const {
    if (!maps_) return {};
    int64_t columns = 1;
    for (int64_t i = 1; i < maps_->dim(); ++i) columns *= maps_->size(i);
    return {maps_->const_data_ptr(), maps_->size(0) > 1 ? maps_->stride(0) : columns};
  }

 private:
  Images() = default;
  static bool without_gaps(const Tensor& t) {
    int64_t expected = 1;
    for (int64_t i = t.dim() - 1; i >= 1; --i) {
      if (t.size(i) != 1 && t.stride(i) != expected) return false;
      expected *= t.size(i);
    }
    return true;
  }

  OptionalTensor maps_;
};

void check_maps(const Tensor& z, const OptionalTensor& tap_sq) {
  STD_TORCH_CHECK(z.dim() >= 2, "chainzrule_kernels: expected z of shape (B, C, *spatial)");
  data_type_of(z);
  if (!tap_sq) return;
  auto expected = sizes_of(z);
  expected.erase(expected.begin());
  const auto sizes = sizes_of(*tap_sq);
  STD_TORCH_CHECK(sizes == expected || (sizes.size() == 1 && sizes[0] == expected[0]),
                  "chainzrule_kernels: tap_sq has the wrong shape");
}

Matrix image_matrix(const Tensor& maps, const ChannelOrder& order) { return {maps.mutable_data_ptr(), order.columns()}; }

// tap_sq as the kernels take it: in the order of memory and in the compute type.
class MapWeights {
 public:
  MapWeights(const OptionalTensor& tap_sq, const MapLayout& layout, ScalarType type)
      : per_channel_(!tap_sq || tap_sq->dim() == 1),
        values_(tap_sq && !per_channel_ ? OptionalTensor(layout.in_order_of_memory(*tap_sq, 0)) : tap_sq, type) {}

  RowSq row_sq() const { return {values_.data(), per_channel_}; }
  bool per_channel() const { return per_channel_; }

 private:
  const bool per_channel_;
  const Parameters values_;
};

// Fills y, which lies in the order of memory, and where they are given norm and kept_z, which lies like y.
void run_spatial_forward(const Tensor& z, const MapLayout& layout, const RowSq& row_sq, const Function& function, const Tensor& y,
                         const OptionalTensor& norm, const OptionalTensor& kept_z) {
  const Images z_images(layout.in_order_of_memory(z));
  DregForward a{};
  a.type = data_type_of(y);
  a.order = layout.order();
  a.function = function.spec();
  a.z = z_images.matrix();
  a.z_is_wide = z.scalar_type() == compute_type_of(z);
  a.y = image_matrix(y, a.order);
  if (kept_z) a.kept_z = image_matrix(*kept_z, a.order);
  a.row_sq = row_sq;
  execute_dreg_forward(a, ForwardPlan(z.size(0), a.order, row_sq.row_width()), norm);
}

std::tuple<Tensor, Tensor> spatial_forward(const Tensor& z, const MapLayout& layout, const RowSq& row_sq,
                                           const Function& function) {
  const Tensor y = empty_like_contiguous(layout.in_order_of_memory(z));
  const Tensor norm = empty({z.size(0)}, compute_type_of(z));
  run_spatial_forward(z, layout, row_sq, function, y, norm, std::nullopt);
  return {layout.in_order_of_schema(y), norm};
}

std::tuple<Tensor, Tensor> spatial_forward(const Tensor& z, const OptionalTensor& tap_sq, const Function& function) {
  check_maps(z, tap_sq);
  const MapLayout layout(z);
  const MapWeights weights(tap_sq, layout, compute_type_of(z));
  return spatial_forward(z, layout, weights.row_sq(), function);
}

// What follows the convolution of a block of samples, while its sums are in the cache. `s` has the compute type; y and kept_s
// lie as s does and may be narrower.
void convolution_block(const Tensor& s, const OptionalTensor& tap_sq, const Tensor& coeffs, const Tensor& y,
                       const OptionalTensor& jac_sq, const OptionalTensor& kept_s) {
  check_maps(s, tap_sq);
  STD_TORCH_CHECK(s.scalar_type() == compute_type_of(y) && sizes_of(s) == sizes_of(y),
                  "chainzrule_kernels: y does not fit the block");
  check_same_shape("kept_s", kept_s, y);
  check_count("jac_sq", jac_sq, s.size(0));
  STD_TORCH_CHECK(!jac_sq || (jac_sq->scalar_type() == s.scalar_type() && jac_sq->is_contiguous()),
                  "chainzrule_kernels: jac_sq has the wrong dtype or strides");
  const MapLayout layout(s);
  const auto where_it_lies = [&](const Tensor& maps) {
    const Tensor in_memory = layout.in_order_of_memory(maps);
    STD_TORCH_CHECK(in_memory.is_contiguous(), "chainzrule_kernels: a result does not lie as the block does");
    return in_memory;
  };
  const MapWeights weights(tap_sq, layout, s.scalar_type());
  run_spatial_forward(s, layout, weights.row_sq(), Function(coeffs, false, s, s.size(1)), where_it_lies(y), jac_sq,
                      kept_s ? OptionalTensor(where_it_lies(*kept_s)) : std::nullopt);
}

void check_gradients_of_maps(const Tensor& z, const OptionalTensor& grad_y, const OptionalTensor& grad_norm) {
  check_same_shape("grad_y", grad_y, z);
  check_count("grad_jac_sq", grad_norm, z.size(0));
}

// Returns the gradient of z where it is wanted, and fills the sums.
Tensor run_spatial_backward(const Tensor& z, const MapLayout& layout, const RowSq& row_sq, const Function& function,
                            const OptionalTensor& grad_y, const OptionalTensor& grad_norm, bool needs_z,
                            const BackwardPlan& plan, const PartialSums& sums, const std::optional<ColumnSums>& column_sums) {
  const Tensor z_in_memory = layout.in_order_of_memory(z);
  const Images z_images(z_in_memory);
  const Images grad_y_images = Images::of(grad_y, layout);
  const Parameters grad_norm_values(grad_norm, compute_type_of(z));
  const Tensor grad_z = needs_z ? empty_like_contiguous(z_in_memory) : nothing(z);
  DregBackward a{};
  a.type = data_type_of(z);
  a.order = layout.order();
  a.function = function.spec();
  a.z = z_images.matrix();
  a.grad_y = grad_y_images.matrix();
  a.grad_norm = grad_norm_values.data();
  a.row_sq = row_sq;
  if (needs_z) a.grad_z = image_matrix(grad_z, a.order);
  const KernelTable& table = kernels();
  plan.execute(1, [&](const Tile& tile, int64_t slab, int64_t split) {
    GradientSums wanted = sums.of(slab, split);
    if (column_sums) wanted.row_sq_columns = column_sums->of(slab);
    table.dreg_backward(a, tile, wanted);
  });
  return needs_z ? layout.in_order_of_schema(grad_z) : grad_z;
}

// Gradients of z, tap_sq and coeffs (empty where not wanted; coeffs is null for an activation).
std::tuple<Tensor, Tensor, Tensor> spatial_backward(const Tensor& z, const OptionalTensor& tap_sq, const Function& function,
                                                    const OptionalTensor& coeffs, const OptionalTensor& grad_y,
                                                    const OptionalTensor& grad_norm, Needs needs) {
  check_maps(z, tap_sq);
  check_gradients_of_maps(z, grad_y, grad_norm);
  STD_TORCH_CHECK(tap_sq || !needs.companion, "chainzrule_kernels: there is no tap_sq to take a gradient of");
  const MapLayout layout(z);
  if (!grad_y && !grad_norm) {
    const auto [grad_z, grad_tap_sq, grad_coeffs] = zero_gradients(layout.in_order_of_memory(z), tap_sq, coeffs, needs);
    return {needs.z ? layout.in_order_of_schema(grad_z) : grad_z, grad_tap_sq, grad_coeffs};
  }
  const MapWeights weights(tap_sq, layout, compute_type_of(z));
  const bool sums_per_column = needs.companion && !weights.per_channel();
  const bool sums_per_channel = needs.companion && weights.per_channel();
  const bool wants_sums = sums_per_channel || needs.coefficients;
  const BackwardPlan plan(z.size(0), layout.order(), 1, sums_per_column ? kForColumns : wants_sums ? kForChannels : kNoSums);
  const PartialSums sums(plan, function.spec(), layout.order(), needs.coefficients, sums_per_channel ? 1 : 0);
  std::optional<ColumnSums> column_sums;
  if (sums_per_column) column_sums.emplace(plan, sizes_of(layout.in_order_of_memory(*tap_sq, 0)), compute_type_of(z));
  const Tensor grad_z = run_spatial_backward(z, layout, weights.row_sq(), function, grad_y, grad_norm, needs.z, plan,
                                             sums, column_sums);
  Tensor grad_tap_sq = nothing(z);
  if (sums_per_channel) grad_tap_sq = sums.row_sq_gradient(*tap_sq, z);
  if (sums_per_column) {
    grad_tap_sq = as_contiguous(layout.in_order_of_schema(column_sums->added_up(tap_sq->scalar_type()), 0));
  }
  return {grad_z, grad_tap_sq, needs.coefficients ? sums.coefficient_gradient(*coeffs, z) : nothing(z)};
}

// ---- tangents -----------------------------------------------------------------------------------------------------

void check_tangents(const Tensor& z, const Tensor& z_dot) {
  auto expected = sizes_of(z);
  expected.insert(expected.begin(), z_dot.dim() > 0 ? z_dot.size(0) : 0);
  STD_TORCH_CHECK(sizes_of(z_dot) == expected && z_dot.scalar_type() == z.scalar_type(),
                  "chainzrule_kernels: z_dot must be (T, *z.shape) with the dtype of z");
}

std::tuple<Tensor, Tensor, Tensor> tangent_forward(const Tensor& z, const Tensor& z_dot, const Function& function) {
  check_tangents(z, z_dot);
  const Rows z_rows(z);
  const TangentRows z_dot_rows(z_dot);
  const Tensor y = empty_like_contiguous(z);
  const Tensor y_dot = empty_like_contiguous(z_dot);
  auto norm_sizes = sizes_of(z_dot);
  norm_sizes.pop_back();
  const Tensor norm = empty(norm_sizes, compute_type_of(z));
  TangentForward a{};
  a.type = data_type_of(z);
  a.columns = z.size(z.dim() - 1);
  a.rows = rows_of(z);
  a.tangents = z_dot.size(0);
  a.function = function.spec();
  a.z = z_rows.matrix();
  a.z_dot = z_dot_rows.matrix();
  a.z_dot_tangent_stride = z_dot_rows.tangent_stride();
  a.y = matrix_of(y);
  a.y_dot = matrix_of(y_dot);
  const ForwardPlan plan(a.rows, a.columns);
  a.splits = plan.splits;
  std::vector<double> partials;
  if (plan.splits > 1) {
    partials.resize(static_cast<size_t>(a.tangents * a.rows * plan.splits));
    a.norm_partials = partials.data();
  } else {
    a.norm = norm.mutable_data_ptr();
  }
  const KernelTable& table = kernels();
  plan.execute(1 + a.tangents, [&](const Tile& tile, int64_t split) { table.tangent_forward(a, tile, split); });
  if (!partials.empty()) add_splits(partials, plan.splits, norm);
  return {y, y_dot, norm};
}

// Gradients of z, z_dot and coeffs (empty where not wanted; coeffs is null for an activation).
std::tuple<Tensor, Tensor, Tensor> tangent_backward(const Tensor& z, const Tensor& z_dot, const Function& function,
                                                    const OptionalTensor& coeffs, const OptionalTensor& grad_y,
                                                    const OptionalTensor& grad_y_dot, const OptionalTensor& grad_norm,
                                                    Needs needs) {
  check_tangents(z, z_dot);
  check_same_shape("grad_y", grad_y, z);
  check_same_shape("grad_y_dot", grad_y_dot, z_dot);
  check_count("grad_tangent_sq", grad_norm, rows_of(z_dot));
  const Rows z_rows(z), grad_y_rows(grad_y);
  const TangentRows z_dot_rows(z_dot), grad_y_dot_rows(grad_y_dot);
  const Parameters grad_norm_values(grad_norm, compute_type_of(z));
  const bool tangents_arrive = z_dot.size(0) > 0 && (grad_y_dot || grad_norm);
  if (!grad_y && !tangents_arrive) return zero_gradients(z, z_dot, coeffs, needs);
  const Tensor grad_z = needs.z ? empty_like_contiguous(z) : nothing(z);
  const Tensor grad_z_dot = needs.companion ? empty_like_contiguous(z_dot) : nothing(z);
  TangentBackward a{};
  a.type = data_type_of(z);
  a.columns = z.size(z.dim() - 1);
  a.rows = rows_of(z);
  a.tangents = z_dot.size(0);
  a.function = function.spec();
  a.z = z_rows.matrix();
  a.z_dot = z_dot_rows.matrix();
  a.z_dot_tangent_stride = z_dot_rows.tangent_stride();
  a.grad_y = grad_y_rows.matrix();
  a.grad_y_dot = grad_y_dot_rows.matrix();
  a.grad_y_dot_tangent_stride = grad_y_dot_rows.tangent_stride();
  a.grad_norm = grad_norm_values.data();
  if (needs.z) a.grad_z = matrix_of(grad_z);
  if (needs.companion) a.grad_z_dot = matrix_of(grad_z_dot);
  const BackwardPlan plan(a.rows, a.columns, a.function.per_channel);
  const PartialSums sums(plan, a.function, ChannelOrder{a.columns}, needs.coefficients, 0);
  const KernelTable& table = kernels();
  plan.execute(1 + a.tangents, [&](const Tile& tile, int64_t slab, int64_t split) {
    table.tangent_backward(a, tile, sums.of(slab, split));
  });
  return {grad_z, grad_z_dot, needs.coefficients ? sums.coefficient_gradient(*coeffs, z) : nothing(z)};
}

// ---- the squares of a weight ------------------------------------------------------------------------------------------

using Integers = std::vector<int64_t>;

// The weight of a convolution (K, C, *window) or of a linear map (K, C), the latter and one whose taps all count alike without
// `size`; `padding` before and behind in turn.
class SquaredWeight {
 public:
  SquaredWeight(const Tensor& weight, const Integers& size, const Integers& stride, const Integers& padding,
                const Integers& dilation)
      : weight_(as_contiguous(weight)) {
    const auto dimensions = static_cast<int64_t>(size.size());
    STD_TORCH_CHECK(weight.dim() >= 2 && (dimensions == 0 || dimensions == weight.dim() - 2) && stride.size() == size.size() &&
                        dilation.size() == size.size() && padding.size() == 2 * size.size(),
                    "chainzrule_kernels: the weight does not fit the sizes");
    arguments_.type = data_type_of(weight);
    arguments_.weight = weight_.const_data_ptr();
    for (int64_t i = 1; i < weight.dim(); ++i) arguments_.columns *= weight.size(i);
    std::vector<SquaredTaps::Dimension> outer;
    for (int64_t d = 0; d < dimensions; ++d) {
      const auto i = static_cast<size_t>(d);
      const int64_t taps = weight.size(d + 2);
      const int64_t reach = dilation[i] * (taps - 1);
      STD_TORCH_CHECK(stride[i] > 0, "chainzrule_kernels: a stride must be positive");
      const int64_t windows = (size[i] + padding[2 * i] + padding[2 * i + 1] - reach - 1) / stride[i] + 1;
      STD_TORCH_CHECK(windows > 0, "chainzrule_kernels: the window does not fit the image");
      sizes_.push_back(windows);
      outer.push_back({taps, windows, size[i], stride[i], padding[2 * i], dilation[i]});
    }
    if (dimensions > 0) {
      arguments_.along = outer.back();
      outer.pop_back();
    }
    find_inside(outer);
    arguments_.inside = inside_.data();
  }
  SquaredWeight(SquaredWeight&&) = default;

  const SquaredTaps& arguments() const { return arguments_; }
  const Tensor& weight() const { return weight_; }

  // (K, *windows)
  std::vector<int64_t> sizes_of_sums() const {
    std::vector<int64_t> sizes{weight_.size(0)};
    sizes.insert(sizes.end(), sizes_.begin(), sizes_.end());
    return sizes;
  }

  // From here on one row for all rows of windows that have the same taps inside. Returns which of them each row was; nothing where
  // there would be too many of them to be worth it, and the rows stay.
  std::vector<int32_t> merge_rows() {
    const auto taps = static_cast<size_t>(arguments_.outer_taps);
    const auto rows = static_cast<size_t>(arguments_.rows);
    std::vector<char> of_kinds;
    std::vector<int32_t> kind_of_row(rows);
    size_t kinds = 0;
    for (size_t row = 0; row < rows; ++row) {
      const char* of_row = inside_.data() + row * taps;
      size_t kind = 0;
      while (kind < kinds && !std::equal(of_row, of_row + taps, of_kinds.data() + kind * taps)) ++kind;
      if (kind == kinds) {
        of_kinds.insert(of_kinds.end(), of_row, of_row + taps);
        if (++kinds * kRowsOfAKind > rows) return {};
      }
      kind_of_row[row] = static_cast<int32_t>(kind);
    }
    arguments_.rows = static_cast<int64_t>(kinds);
    inside_ = std::move(of_kinds);
    arguments_.inside = inside_.data();
    return kind_of_row;
  }

  // The sums, times factors[k] where there are any, into `result`, which has the compute type.
  void sum(const void* factors, const Tensor& result) const {
    SquaredTaps a = arguments_;
    a.factors = factors;
    a.result = result.mutable_data_ptr();
    const KernelTable& table = kernels();
    execute([&](int64_t begin, int64_t end) { table.squared_taps(a, begin, end); });
  }

  // The gradients of the weight and, in the compute type, of the factors, where they are not null, for the gradient of the sums.
  void differentiate(const Tensor& grad, const void* factors, const OptionalTensor& weight_gradient,
                     const OptionalTensor& factor_gradients) const {
    SquaredTaps a = arguments_;
    a.grad = grad.const_data_ptr();
    a.factors = factors;
    if (weight_gradient) a.result = weight_gradient->mutable_data_ptr();
    if (factor_gradients) a.factor_gradients = factor_gradients->mutable_data_ptr();
    const KernelTable& table = kernels();
    execute([&](int64_t begin, int64_t end) { table.squared_taps_backward(a, begin, end); });
  }

 private:
  // Of every row of windows, the taps of the outer dimensions that are inside in each of them.
  void find_inside(const std::vector<SquaredTaps::Dimension>& outer) {
    inside_.assign(1, 1);
    for (const SquaredTaps::Dimension& dimension : outer) {
      const std::vector<char> before = std::move(inside_);
      const int64_t rows = arguments_.rows;
      const int64_t taps = arguments_.outer_taps;
      arguments_.rows *= dimension.windows;
      arguments_.outer_taps *= dimension.taps;
      inside_.assign(static_cast<size_t>(arguments_.rows * arguments_.outer_taps), 0);
      for (int64_t t = 0; t < dimension.taps; ++t) {
        const int64_t end = dimension.end(t);
        for (int64_t window = dimension.begin(t); window < end; ++window) {
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t tap = 0; tap < taps; ++tap) {
              const int64_t place = (row * dimension.windows + window) * arguments_.outer_taps + tap * dimension.taps + t;
              inside_[static_cast<size_t>(place)] = before[static_cast<size_t>(row * taps + tap)];
            }
          }
        }
      }
    }
  }

  // Calls run(begin, end) for ranges of units, in parallel.
  template <class Run>
  void execute(const Run& run) const {
    const int64_t work = std::max<int64_t>(1, arguments_.columns + arguments_.windows());
    torch::stable::parallel_for(0, weight_.size(0), std::max<int64_t>(1, kGrain / work), run);
  }

  const Tensor weight_;
  SquaredTaps arguments_;
  Integers sizes_;
  std::vector<char> inside_;
};

Tensor squared_taps(const Tensor& weight, const Integers& size, const Integers& stride, const Integers& padding,
                    const Integers& dilation) {
  const SquaredWeight squares(weight, size, stride, padding, dilation);
  const Tensor result = empty(squares.sizes_of_sums(), compute_type_of(weight));
  squares.sum(nullptr, result);
  return result;
}

Tensor squared_taps_backward(const Tensor& weight, const Tensor& grad, const Integers& size, const Integers& stride,
                             const Integers& padding, const Integers& dilation) {
  const SquaredWeight squares(weight, size, stride, padding, dilation);
  STD_TORCH_CHECK(sizes_of(grad) == squares.sizes_of_sums(), "chainzrule_kernels: grad has the wrong shape");
  const Tensor result = empty(sizes_of(weight), weight.scalar_type());
  squares.differentiate(as_contiguous(in_type(grad, compute_type_of(weight))), nullptr, result, std::nullopt);
  return result;
}

// ---- feature maps that a convolution made: its weight in the place of what weights the slopes --------------------------

// The squares of the weight as what weights the slopes of the convolution's maps: for each channel where all taps count alike, for
// each row of a kind where the rows of the images are of few kinds, and for each column elsewhere.
class ConvolutionWeights {
 public:
  ConvolutionWeights(const Tensor& z, const MapLayout& layout, const OptionalTensor& factor, SquaredWeight squares)
      : type_(compute_type_of(z)), layout_(layout), squares_(std::move(squares)), factor_(factor, type_) {
    sizes_ = squares_.sizes_of_sums();
    const auto sizes = sizes_of(z);
    STD_TORCH_CHECK(sizes.size() > sizes_.size() && std::equal(sizes_.begin(), sizes_.end(), sizes.begin() + 1) &&
                        (sizes_.size() == 1 || sizes.size() == sizes_.size() + 1),
                    "chainzrule_kernels: z is not the result of a convolution with this weight");
    STD_TORCH_CHECK(compute_type_of(squares_.weight()) == type_, "chainzrule_kernels: the weight has the wrong dtype");
    check_count("factor", factor, z.size(1));
    if (sizes_.size() == 1) return;
    const int64_t width = squares_.arguments().along.windows;
    if (layout.order().outermost && kernels().takes_rows(data_type_of(z), width)) kind_of_row_ = squares_.merge_rows();
    by_kind_ = !kind_of_row_.empty();
    rows_ = {width, squares_.arguments().rows, kind_of_row_.data()};
  }
  ConvolutionWeights(const ConvolutionWeights&) = delete;

  bool per_column() const { return sizes_.size() > 1 && !by_kind_; }
  int64_t sums_per_channel() const { return squares_.arguments().windows(); }
  std::vector<int64_t> sizes_in_memory() const {
    auto sizes = sizes_;
    if (layout_.channels_innermost()) std::rotate(sizes.begin(), sizes.begin() + 1, sizes.end());
    return sizes;
  }

  // As the kernels take them.
  Tensor values() const {
    const Tensor sums = by_kind_ ? empty({sizes_[0], sums_per_channel()}, type_) : empty(sizes_, type_);
    squares_.sum(factor_.data(), sums);
    return per_column() ? as_contiguous(layout_.in_order_of_memory(sums, 0)) : sums;
  }
  RowSq row_sq(const OptionalTensor& values) const {
    return {values ? values->const_data_ptr() : nullptr, !per_column(), by_kind_ ? &rows_ : nullptr};
  }

  // The gradients of the weight and of the factor, where they are not null; `grad` is that of the values, in the order of schema.
  void differentiate(const Tensor& grad, const OptionalTensor& weight_gradient, const OptionalTensor& factor_gradient) const {
    squares_.differentiate(grad, factor_.data(), weight_gradient, factor_gradient);
  }

 private:
  const ScalarType type_;
  const MapLayout& layout_;
  SquaredWeight squares_;
  const Parameters factor_;
  std::vector<int64_t> sizes_;  // (K, *windows), or (K) where all taps count alike
  bool by_kind_ = false;
  std::vector<int32_t> kind_of_row_;
  RowKinds rows_;
};

std::tuple<Tensor, Tensor, Tensor> convolved_backward(const Tensor& z, const MapLayout& layout, const ConvolutionWeights& weights,
                                                      const Tensor& weight, const OptionalTensor& factor,
                                                      const Function& function, const OptionalTensor& grad_y,
                                                      const OptionalTensor& grad_norm, bool needs_z, bool needs_weight,
                                                      bool needs_factor) {
  const bool wants_sums = grad_norm && (needs_weight || needs_factor);
  const bool sums_per_column = wants_sums && weights.per_column();
  const bool sums_per_channel = wants_sums && !sums_per_column;
  OptionalTensor values;
  if (grad_norm && activation_is_curved(function.spec().activation)) values = weights.values();
  const RowSq row_sq = weights.row_sq(values);
  const BackwardPlan plan(z.size(0), layout.order(), row_sq.row_width(),
                          sums_per_column ? kForColumns : sums_per_channel ? kForChannels : kNoSums);
  const PartialSums sums(plan, function.spec(), layout.order(), false, sums_per_channel ? weights.sums_per_channel() : 0);
  std::optional<ColumnSums> column_sums;
  if (sums_per_column) column_sums.emplace(plan, weights.sizes_in_memory(), compute_type_of(z));
  const Tensor grad_z = run_spatial_backward(z, layout, row_sq, function, grad_y, grad_norm, needs_z, plan,
                                             sums, column_sums);
  if (!wants_sums) {
    const auto [no_grad_z, no_grad_weight, no_grad_factor] =
        zero_gradients(z, weight, factor, {false, needs_weight, needs_factor});
    return {grad_z, no_grad_weight, no_grad_factor};
  }
  const Tensor grad = sums_per_column
                          ? as_contiguous(layout.in_order_of_schema(column_sums->added_up(compute_type_of(z)), 0))
                          : sums.row_sq_gradient({z.size(1) * weights.sums_per_channel()}, compute_type_of(z));
  OptionalTensor grad_weight, grad_factor;
  if (needs_weight) grad_weight = empty(sizes_of(weight), weight.scalar_type());
  if (needs_factor) grad_factor = empty(sizes_of(*factor), compute_type_of(z));
  weights.differentiate(grad, grad_weight, grad_factor);
  return {grad_z, needs_weight ? *grad_weight : nothing(z), needs_factor ? in_type(*grad_factor, factor->scalar_type()) : nothing(z)};
}

// ---- the operators, with the signatures of their schemas ----------------------------------------------------------

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Tensor polynomial(const Tensor& z, const Tensor& coeffs, bool rectified) {
  check_data(z);
  const Tensor y = empty_like_contiguous(z);
  run_dreg_forward(z, Function(coeffs, rectified, z), std::nullopt, y, std::nullopt, std::nullopt);
  return y;
}

Three polynomial_dreg(const Tensor& z, const OptionalTensor& row_sq, const Tensor& coeffs, bool rectified,
                      bool return_derivative) {
  check_data(z);
  return dreg_forward(z, row_sq, Function(coeffs, rectified, z), return_derivative);
}

Three polynomial_dreg_backward(const Tensor& z, const OptionalTensor& row_sq, const Tensor& coeffs,
                               const OptionalTensor& grad_y, const OptionalTensor& grad_jac_sq,
                               const OptionalTensor& grad_derivative, bool rectified, bool needs_z, bool needs_row_sq,
                               bool needs_coeffs) {
  check_data(z);
  return dreg_backward(z, row_sq, Function(coeffs, rectified, z), coeffs, grad_y, grad_jac_sq, grad_derivative,
                       {needs_z, needs_row_sq, needs_coeffs});
}

Three activation_dreg(const Tensor& z, const OptionalTensor& row_sq, const std::string& kind, bool return_derivative) {
  check_data(z);
  return dreg_forward(z, row_sq, Function(kind), return_derivative);
}

Two activation_dreg_backward(const Tensor& z, const OptionalTensor& row_sq, const OptionalTensor& grad_y,
                             const OptionalTensor& grad_jac_sq, const OptionalTensor& grad_derivative,
                             const std::string& kind, bool needs_z, bool needs_row_sq) {
  check_data(z);
  const auto [dz, drow_sq, dcoeffs] = dreg_backward(z, row_sq, Function(kind), std::nullopt, grad_y, grad_jac_sq,
                                                    grad_derivative, {needs_z, needs_row_sq, false});
  return {dz, drow_sq};
}

Two polynomial_spatial_dreg(const Tensor& z, const OptionalTensor& tap_sq, const Tensor& coeffs, bool rectified) {
  check_maps(z, tap_sq);
  return spatial_forward(z, tap_sq, Function(coeffs, rectified, z, z.size(1)));
}

Three polynomial_spatial_dreg_backward(const Tensor& z, const OptionalTensor& tap_sq, const Tensor& coeffs,
                                       const OptionalTensor& grad_y, const OptionalTensor& grad_jac_sq, bool rectified,
                                       bool needs_z, bool needs_tap_sq, bool needs_coeffs) {
  check_maps(z, tap_sq);
  return spatial_backward(z, tap_sq, Function(coeffs, rectified, z, z.size(1)), coeffs, grad_y, grad_jac_sq,
                          {needs_z, needs_tap_sq, needs_coeffs});
}

Two activation_spatial_dreg(const Tensor& z, const OptionalTensor& tap_sq, const std::string& kind) {
  return spatial_forward(z, tap_sq, Function(kind));
}

Two activation_spatial_dreg_backward(const Tensor& z, const OptionalTensor& tap_sq, const OptionalTensor& grad_y,
                                     const OptionalTensor& grad_jac_sq, const std::string& kind, bool needs_z,
                                     bool needs_tap_sq) {
  const auto [dz, dtap_sq, dcoeffs] = spatial_backward(z, tap_sq, Function(kind), std::nullopt, grad_y, grad_jac_sq,
                                                       {needs_z, needs_tap_sq, false});
  return {dz, dtap_sq};
}

Two convolved_activation_dreg(const Tensor& z, const Tensor& weight, const OptionalTensor& factor, const Integers& size,
                              const Integers& stride, const Integers& padding, const Integers& dilation,
                              const std::string& kind) {
  check_maps(z, std::nullopt);
  const MapLayout layout(z);
  const ConvolutionWeights weights(z, layout, factor, SquaredWeight(weight, size, stride, padding, dilation));
  const Tensor values = weights.values();
  return spatial_forward(z, layout, weights.row_sq(values), Function(kind));
}

Three convolved_activation_dreg_backward(const Tensor& z, const Tensor& weight, const OptionalTensor& factor,
                                         const OptionalTensor& grad_y, const OptionalTensor& grad_jac_sq, const Integers& size,
                                         const Integers& stride, const Integers& padding, const Integers& dilation,
                                         const std::string& kind, bool needs_z, bool needs_weight, bool needs_factor) {
  check_maps(z, std::nullopt);
  check_gradients_of_maps(z, grad_y, grad_jac_sq);
  STD_TORCH_CHECK(factor || !needs_factor, "chainzrule_kernels: there is no factor to take a gradient of");
  const MapLayout layout(z);
  const ConvolutionWeights weights(z, layout, factor, SquaredWeight(weight, size, stride, padding, dilation));
  if (!grad_y && !grad_jac_sq) {
    const auto [grad_z, grad_weight, grad_factor] =
        zero_gradients(layout.in_order_of_memory(z), weight, factor, {needs_z, needs_weight, needs_factor});
    return {needs_z ? layout.in_order_of_schema(grad_z) : grad_z, grad_weight, grad_factor};
  }
  return convolved_backward(z, layout, weights, weight, factor, Function(kind), grad_y, grad_jac_sq, needs_z, needs_weight,
                            needs_factor);
}

Three polynomial_tangent(const Tensor& z, const Tensor& z_dot, const Tensor& coeffs, bool rectified) {
  check_data(z);
  return tangent_forward(z, z_dot, Function(coeffs, rectified, z));
}

Three polynomial_tangent_backward(const Tensor& z, const Tensor& z_dot, const Tensor& coeffs, const OptionalTensor& grad_y,
                                  const OptionalTensor& grad_y_dot, const OptionalTensor& grad_tangent_sq, bool rectified,
                                  bool needs_z, bool needs_z_dot, bool needs_coeffs) {
  check_data(z);
  return tangent_backward(z, z_dot, Function(coeffs, rectified, z), coeffs, grad_y, grad_y_dot, grad_tangent_sq,
                          {needs_z, needs_z_dot, needs_coeffs});
}

Three activation_tangent(const Tensor& z, const Tensor& z_dot, const std::string& kind) {
  check_data(z);
  return tangent_forward(z, z_dot, Function(kind));
}

Two activation_tangent_backward(const Tensor& z, const Tensor& z_dot, const OptionalTensor& grad_y,
                                const OptionalTensor& grad_y_dot, const OptionalTensor& grad_tangent_sq,
                                const std::string& kind, bool needs_z, bool needs_z_dot) {
  check_data(z);
  const auto [dz, dz_dot, dcoeffs] = tangent_backward(z, z_dot, Function(kind), std::nullopt, grad_y, grad_y_dot,
                                                      grad_tangent_sq, {needs_z, needs_z_dot, false});
  return {dz, dz_dot};
}

}  // namespace
}  // namespace chainzrule

STABLE_TORCH_LIBRARY_IMPL(chainzrule_kernels, CPU, library) {
  library.impl("polynomial", TORCH_BOX(&chainzrule::polynomial));
  library.impl("polynomial_dreg", TORCH_BOX(&chainzrule::polynomial_dreg));
  library.impl("polynomial_dreg_backward", TORCH_BOX(&chainzrule::polynomial_dreg_backward));
  library.impl("activation_dreg", TORCH_BOX(&chainzrule::activation_dreg));
  library.impl("activation_dreg_backward", TORCH_BOX(&chainzrule::activation_dreg_backward));
  library.impl("polynomial_spatial_dreg", TORCH_BOX(&chainzrule::polynomial_spatial_dreg));
  library.impl("polynomial_spatial_dreg_backward", TORCH_BOX(&chainzrule::polynomial_spatial_dreg_backward));
  library.impl("activation_spatial_dreg", TORCH_BOX(&chainzrule::activation_spatial_dreg));
  library.impl("activation_spatial_dreg_backward", TORCH_BOX(&chainzrule::activation_spatial_dreg_backward));
  library.impl("convolved_activation_dreg", TORCH_BOX(&chainzrule::convolved_activation_dreg));
  library.impl("convolved_activation_dreg_backward", TORCH_BOX(&chainzrule::convolved_activation_dreg_backward));
  library.impl("squared_taps", TORCH_BOX(&chainzrule::squared_taps));
  library.impl("squared_taps_backward", TORCH_BOX(&chainzrule::squared_taps_backward));
  library.impl("_empty_for_results", TORCH_BOX(&chainzrule::empty_for_results));
  library.impl("_polynomial_convolution_block", TORCH_BOX(&chainzrule::convolution_block));
  library.impl("polynomial_tangent", TORCH_BOX(&chainzrule::polynomial_tangent));
  library.impl("polynomial_tangent_backward", TORCH_BOX(&chainzrule::polynomial_tangent_backward));
  library.impl("activation_tangent", TORCH_BOX(&chainzrule::activation_tangent));
  library.impl("activation_tangent_backward", TORCH_BOX(&chainzrule::activation_tangent_backward));
}
