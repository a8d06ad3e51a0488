// The CPU kernels, compiled once for each instruction set by kernels_baseline.cpp, kernels_avx2.cpp and kernels_avx512.cpp.
//
// Data goes through in chunks of at most 64 vectors of one row. A chunk is computed by a function that knows the scalar
// function (polynomial of some degree, or activation) and works on float or double in memory; around it the drivers convert
// half precision, walk over rows, and keep the sums. Sums run in a fixed order: for each lane over 16 vectors, then over a
// chunk; or for each channel over kRowsPerSum rows; then in double. Long chains of additions would lose more than PyTorch does.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/arguments.h"
#include "cpu/vector.h"
#include "math/activations.h"
#include "math/half.h"
#include "math/polynomial.h"

namespace chainzrule::CHAINZRULE_TARGET {

// Short enough for the sums over one chunk to stay accurate however narrow the vectors are. Sums of floats go on in double;
// those of doubles have nothing wider to go on in, and float64 is for checking, not for speed.
template <class E>
constexpr int64_t kChunk = (std::is_same_v<E, double> ? 16 : 64) * kLanes<E>;
constexpr int kMaxDegree = 8;
constexpr int64_t kMaxTangentsAtOnce = 64;

// ---- the scalar function as a chunk sees it: `at(j, extent)` is the function of the vector of channels at column j ------

template <int Degree, class E>
struct SharedPolynomial {
  static constexpr int kDegree = Degree;
  static constexpr bool kPerChannel = false;
  Polynomial<Vector<E>, Degree> polynomial;
  Polynomial<Vector<E>, Degree - 1> derivative;

  SharedPolynomial(const E* coefficients, int64_t /*columns*/) {
    unrolled<Degree + 1>([&](auto k) { polynomial.coefficients[k] = broadcast(coefficients[k]); });
    derivative = polynomial.derivative();
  }
  template <class Extent>
  CHAINZRULE_INLINE const Polynomial<Vector<E>, Degree>& at(int64_t, Extent) const {
    return polynomial;
  }
};

template <int Degree, class E>
struct ChannelPolynomial {
  static constexpr int kDegree = Degree;
  static constexpr bool kPerChannel = true;
  const E* coefficients;
  int64_t columns;

  ChannelPolynomial(const E* coefficients, int64_t columns) : coefficients(coefficients), columns(columns) {}
  template <class Extent>
  CHAINZRULE_INLINE Polynomial<Vector<E>, Degree> at(int64_t j, Extent extent) const {
    Polynomial<Vector<E>, Degree> result;
    unrolled<Degree + 1>([&](auto k) { result.coefficients[k] = load(coefficients + k * columns + j, extent); });
    return result;
  }
};

template <class Activation, class E>
struct FixedActivation {
  static constexpr int kDegree = 0;  // no coefficients
  static constexpr bool kPerChannel = false;

  FixedActivation(const E*, int64_t) {}
  template <class Extent>
  CHAINZRULE_INLINE Activation at(int64_t, Extent) const {
    return {};
  }
};

// ---- one chunk ------------------------------------------------------------------------------------------------------

template <class E>
struct ForwardChunk {
  const E* coefficients;  // of the chunk's first channel
  int64_t columns;        // between coefficient k and k + 1 of a channel
  const E* z;
  E* y;
  E* derivative;    // may be null
  const E* row_sq;  // null for 1
  int64_t n;
};

template <class E>
struct BackwardChunk {
  const E* coefficients;
  int64_t columns;
  const E* z;
  const E* grad_y;           // null: absent
  const E* grad_derivative;  // null: absent
  const E* row_sq;           // null for 1
  bool has_grad_norm;
  E twice_grad_norm;  // 2 g_s, where has_grad_norm
  E* grad_z;
  E* coefficient_sums;  // [k * sums_stride + j] (per channel) or [k * lanes] (shared)
  int64_t sums_stride;
  E* row_sq_sums;  // [j], null: not wanted
  int64_t n;
};

// The slope and the curvature, which are all that a backward needs.
template <class Function, class E, class Extent>
CHAINZRULE_INLINE Jet<Vector<E>> jet_of_slope(const Function& function, Vector<E> z, int64_t j, Extent extent) {
  if constexpr (Function::kDegree > 0 && !Function::kPerChannel) {
    // p' is at hand as a polynomial: two multiply-adds fewer than by way of p.
    const Jet<Vector<E>> slope = function.derivative.jet(z);
    return {z, slope.value, slope.slope};
  } else {
    decltype(auto) f = function.at(j, extent);
    return f.jet(z);
  }
}

// y, and the sum over the chunk of f'^2 row_sq where kNorm.
template <class Function, class E, bool kNorm>
double forward_chunk(ForwardChunk<E> chunk) {
  using V = Vector<E>;
  const Function function(chunk.coefficients, chunk.columns);
  V squares{};
  for_each_block<E>(chunk.n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    V recent{};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      decltype(auto) f = function.at(j, extent);
      const Jet<V> jet = f.jet(load(chunk.z + j, extent));
      store(chunk.y + j, jet.value, extent);
      if constexpr (kNorm) {
        if (chunk.derivative) store(chunk.derivative + j, jet.slope, extent);
        V square = jet.slope * jet.slope;
        if (chunk.row_sq) square = square * load(chunk.row_sq + j, extent);
        recent += keep(square, extent);
      }
    });
    squares += recent;
  });
  return kNorm ? sum_of_lanes<E>(squares) : 0.0;
}

// grad_z = g_y f' + h f'' with h = 2 g_s row_sq f' + g_d; adds to the sums of the parameters.
template <class Function, class E, bool kValueGradient, bool kSlopeGradient>
void backward_chunk(BackwardChunk<E> chunk) {
  using V = Vector<E>;
  constexpr int kDegree = Function::kDegree;
  const Function function(chunk.coefficients, chunk.columns);
  constexpr bool kShared = kDegree > 0 && !Function::kPerChannel;
  const V twice_grad_norm = broadcast(chunk.twice_grad_norm);
  for_each_block<E>(chunk.n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    V shared_sums[kDegree + 1] = {};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      const V z = load(chunk.z + j, extent);
      const Jet<V> jet = jet_of_slope<Function, E>(function, z, j, extent);
      V g_y{};
      V h{};
      V grad_z{};
      if constexpr (kValueGradient) {
        g_y = load(chunk.grad_y + j, extent);
        grad_z = g_y * jet.slope;
      }
      if constexpr (kSlopeGradient) {
        if (chunk.grad_derivative) h = load(chunk.grad_derivative + j, extent);
        if (chunk.has_grad_norm) {
          V norm_part = twice_grad_norm * jet.slope;
          if (chunk.row_sq) norm_part = norm_part * load(chunk.row_sq + j, extent);
          h = chunk.grad_derivative ? h + norm_part : norm_part;
          if (chunk.row_sq_sums) {
            const V square = E(0.5) * twice_grad_norm * jet.slope * jet.slope;
            store(chunk.row_sq_sums + j, load(chunk.row_sq_sums + j, extent) + square, extent);
          }
        }
        h = keep(h, extent);
        grad_z = kValueGradient ? grad_z + h * jet.curvature : h * jet.curvature;
      }
      if (chunk.grad_z) store(chunk.grad_z + j, grad_z, extent);
      if constexpr (kShared) {
        add_coefficient_gradients<kDegree, kValueGradient, kSlopeGradient>(z, g_y, h, shared_sums);
      } else if constexpr (kDegree > 0) {
        V sums[kDegree + 1];
        unrolled<kDegree + 1>([&](auto k) { sums[k] = load(chunk.coefficient_sums + k * chunk.sums_stride + j, extent); });
        add_coefficient_gradients<kDegree, kValueGradient, kSlopeGradient>(z, g_y, h, sums);
        unrolled<kDegree + 1>([&](auto k) { store(chunk.coefficient_sums + k * chunk.sums_stride + j, sums[k], extent); });
      }
    });
    if constexpr (kShared) {
      unrolled<kDegree + 1>([&](auto k) {
        E* sum = chunk.coefficient_sums + k * kLanes<E>;
        store(sum, load(sum, Whole{}) + shared_sums[k], Whole{});
      });
    }
  });
}

// ---- the choice of the chunk functions ------------------------------------------------------------------------------

enum Gradients { kOfValue, kOfSlope, kOfBoth };

template <class E>
struct ChunkFunctions {
  double (*value)(ForwardChunk<E>);
  double (*value_and_norm)(ForwardChunk<E>);
  std::array<void (*)(BackwardChunk<E>), 3> backward;  // by Gradients
};

template <class Function, class E>
constexpr ChunkFunctions<E> chunk_functions_of() {
  return {forward_chunk<Function, E, false>,
          forward_chunk<Function, E, true>,
          {backward_chunk<Function, E, true, false>, backward_chunk<Function, E, false, true>,
           backward_chunk<Function, E, true, true>}};
}

template <class E, int Degree = 1>
ChunkFunctions<E> polynomial_functions(int degree, bool per_channel) {
  if constexpr (Degree < kMaxDegree) {
    if (degree != Degree) return polynomial_functions<E, Degree + 1>(degree, per_channel);
  }
  return per_channel ? chunk_functions_of<ChannelPolynomial<Degree, E>, E>()
                     : chunk_functions_of<SharedPolynomial<Degree, E>, E>();
}

template <class E>
ChunkFunctions<E> activation_functions(int activation) {
  ChunkFunctions<E> result{};
  int index = 0;
  for_each_activation([&](auto kind) {
    if (index++ == activation) result = chunk_functions_of<FixedActivation<decltype(kind), E>, E>();
  });
  return result;
}

template <class E>
ChunkFunctions<E> chunk_functions(const FunctionSpec& function) {
  return function.activation >= 0 ? activation_functions<E>(function.activation)
                                  : polynomial_functions<E>(function.degree, function.per_channel);
}

// ---- data types: a chunk of any of them as float or double ------------------------------------------------------------

// Room for one chunk; half precision is widened into it, float and double are used where they lie.
template <class E>
struct Buffer {
  alignas(64) E data[kChunk<E>];
};

template <class S, class E>
CHAINZRULE_INLINE const E* read(const S* from, int64_t n, Buffer<E>& buffer) {
  if constexpr (std::is_same_v<S, E>) {
    return from;
  } else {
    for (int64_t j = 0; j < n; ++j) buffer.data[j] = widened(from[j]);
    return buffer.data;
  }
}

// Where a chunk function may write what belongs to `to`; `finish` carries it there. Null stays null.
template <class S, class E>
CHAINZRULE_INLINE E* target(S* to, Buffer<E>& buffer) {
  if constexpr (std::is_same_v<S, E>) {
    return to;
  } else {
    return to ? buffer.data : nullptr;
  }
}
template <class S, class E>
CHAINZRULE_INLINE void finish(S* to, int64_t n, const Buffer<E>& buffer) {
  if constexpr (!std::is_same_v<S, E>) {
    if (!to) return;
    for (int64_t j = 0; j < n; ++j) narrow(buffer.data[j], to[j]);
  }
}

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// Calls body with a null pointer to the storage type.
template <class Body>
void with_storage(DataType type, const Body& body) {
  switch (type) {
    case DataType::float32:
      return body(static_cast<float*>(nullptr));
    case DataType::float64:
      return body(static_cast<double*>(nullptr));
    case DataType::bfloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case DataType::float16:
      return body(static_cast<Float16*>(nullptr));
  }
}

template <class S>
CHAINZRULE_INLINE const S* at(const ConstMatrix& matrix, int64_t row, int64_t column) {
  return matrix.data ? static_cast<const S*>(matrix.data) + row * matrix.row_stride + column : nullptr;
}
template <class S>
CHAINZRULE_INLINE S* at(const Matrix& matrix, int64_t row, int64_t column) {
  return matrix.data ? static_cast<S*>(matrix.data) + row * matrix.row_stride + column : nullptr;
}

// Between arrays that a loop reads side by side: not a multiple of 4096 bytes, at which they would share the lines of the
// first-level cache and wait for each other's stores.
constexpr int64_t kSkew = 48;
constexpr int64_t kSumsStride = kColumnsPerSum + kSkew;

// The parameters of the channels of a tile, as its chunks read them: copied side by side with a skew where the tile has rows
// enough to make that worth while, and where they lie otherwise.
template <class E>
class TileParameters {
 public:
  TileParameters(const FunctionSpec& function, const void* row_sq, const Tile& tile, int64_t columns)
      : coefficients_(static_cast<const E*>(function.coefficients)), row_sq_(static_cast<const E*>(row_sq)), stride_(columns) {
    const int64_t count = function.per_channel ? function.degree + 1 : 0;
    shared_ = count == 0;
    if ((count == 0 && !row_sq_) || tile.row_end - tile.row_begin < 8) return;
    const int64_t width = tile.column_end - tile.column_begin;
    const int64_t skewed = (width + kColumnsPerSum - 1) / kColumnsPerSum * kColumnsPerSum + kSkew;
    copy_.reset(new E[static_cast<size_t>((count + 1) * skewed)]);
    for (int64_t k = 0; k < count; ++k) {
      std::copy_n(coefficients_ + k * columns + tile.column_begin, width, copy_.get() + k * skewed);
    }
    if (row_sq_) {
      std::copy_n(row_sq_ + tile.column_begin, width, copy_.get() + count * skewed);
      row_sq_ = copy_.get() + count * skewed;
      row_sq_begin_ = tile.column_begin;
    }
    if (count > 0) {
      coefficients_ = copy_.get();
      coefficients_begin_ = tile.column_begin;
      stride_ = skewed;
    }
  }

  const E* coefficients(int64_t column) const { return shared_ ? coefficients_ : coefficients_ + (column - coefficients_begin_); }
  int64_t stride() const { return stride_; }
  const E* row_sq(int64_t column) const { return row_sq_ ? row_sq_ + (column - row_sq_begin_) : nullptr; }

 private:
  const E* coefficients_;
  const E* row_sq_;
  int64_t stride_;
  int64_t coefficients_begin_ = 0;
  int64_t row_sq_begin_ = 0;
  bool shared_ = false;
  std::unique_ptr<E[]> copy_;
};

// A norm is complete when the tile holds whole rows; otherwise it is one of several parts.
template <class E>
CHAINZRULE_INLINE void put_norm(void* norm, double* partials, int64_t index, int64_t splits, int64_t split, double sum) {
  if (partials) {
    partials[index * splits + split] = sum;
  } else {
    static_cast<E*>(norm)[index] = static_cast<E>(sum);
  }
}

// ---- drivers: the forward ---------------------------------------------------------------------------------------------

template <class S>
void dreg_forward_tile(const DregForward& a, const Tile& tile, int64_t split) {
  using E = typename ComputeOf<S>::type;
  const bool wants_norm = a.norm || a.norm_partials;
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function);
  const TileParameters<E> parameters(a.function, a.row_sq, tile, a.columns);
  Buffer<E> z_buffer, y_buffer, derivative_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    double norm = 0;
    for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
      const int64_t n = std::min(kChunk<E>, tile.column_end - column);
      S* y = at<S>(a.y, row, column);
      S* derivative = at<S>(a.derivative, row, column);
      const ForwardChunk<E> chunk{parameters.coefficients(column),
                                  parameters.stride(),
                                  read(at<S>(a.z, row, column), n, z_buffer),
                                  target(y, y_buffer),
                                  target(derivative, derivative_buffer),
                                  parameters.row_sq(column),
                                  n};
      norm += (wants_norm ? functions.value_and_norm : functions.value)(chunk);
      finish(y, n, y_buffer);
      finish(derivative, n, derivative_buffer);
    }
    if (wants_norm) put_norm<E>(a.norm, a.norm_partials, row, a.splits, split, norm);
  }
}

// y_dot = slope * z_dot; returns the sum of its squares.
template <class E>
double push_tangent(const E* slope, const E* z_dot, E* y_dot, int64_t n) {
  Vector<E> squares{};
  for_each_block<E>(n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    Vector<E> recent{};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      const Vector<E> pushed = load(slope + j, extent) * load(z_dot + j, extent);
      store(y_dot + j, pushed, extent);
      recent += keep(pushed * pushed, extent);
    });
    squares += recent;
  });
  return sum_of_lanes<E>(squares);
}

template <class S>
void tangent_forward_tile(const TangentForward& a, const Tile& tile, int64_t split) {
  using E = typename ComputeOf<S>::type;
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function);
  const TileParameters<E> parameters(a.function, nullptr, tile, a.columns);
  Buffer<E> z_buffer, y_buffer, slope_buffer, z_dot_buffer, y_dot_buffer;
  std::array<double, kMaxTangentsAtOnce> norms;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    // A row's norms are kept on the stack, so tangents beyond kMaxTangentsAtOnce take another turn over the row.
    for (int64_t first = 0; first == 0 || first < a.tangents; first += kMaxTangentsAtOnce) {
      const int64_t last = std::min(first + kMaxTangentsAtOnce, a.tangents);
      norms.fill(0);
      for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
        const int64_t n = std::min(kChunk<E>, tile.column_end - column);
        S* y = at<S>(a.y, row, column);
        functions.value_and_norm({parameters.coefficients(column), parameters.stride(),
                                  read(at<S>(a.z, row, column), n, z_buffer), target(y, y_buffer), slope_buffer.data,
                                  nullptr, n});
        if (first == 0) finish(y, n, y_buffer);
        for (int64_t t = first; t < last; ++t) {
          const S* z_dot = at<S>(a.z_dot, row, column) + t * a.z_dot_tangent_stride;
          S* y_dot = at<S>(a.y_dot, t * a.rows + row, column);
          norms[t - first] += push_tangent(slope_buffer.data, read(z_dot, n, z_dot_buffer), target(y_dot, y_dot_buffer), n);
          finish(y_dot, n, y_dot_buffer);
        }
      }
      for (int64_t t = first; t < last; ++t) {
        put_norm<E>(a.norm, a.norm_partials, t * a.rows + row, a.splits, split, norms[t - first]);
      }
    }
  }
}

// ---- drivers: the backward --------------------------------------------------------------------------------------------

// The sums that a backward tile keeps for the parameters: in the compute type for one chunk (shared coefficients) or for
// kRowsPerSum rows (one sum for each channel), then in double.
template <class E>
class ParameterSums {
 public:
  ParameterSums(const FunctionSpec& function, const Tile& tile, int64_t columns, GradientSums sums)
      : coefficients_(function.activation >= 0 ? 0 : function.degree + 1),
        per_channel_(function.per_channel),
        first_column_(tile.column_begin),
        width_(tile.column_end - tile.column_begin),
        columns_(columns),
        sums_(sums) {
    if (per_channel_) {
      for (int k = 0; k < coefficients_; ++k) std::fill_n(recent_ + k * kSumsStride, width_, E(0));
      for (int k = 0; sums_.coefficients && k < coefficients_; ++k) std::fill_n(total_of(k), width_, 0.0);
    } else {
      std::fill_n(recent_, coefficients_ * kLanes<E>, E(0));
      std::fill_n(lanes_, coefficients_ * kLanes<E>, 0.0);
      std::fill_n(lost_, coefficients_ * kLanes<E>, 0.0);
    }
    if (sums_.row_sq) {
      std::fill_n(recent_row_sq_, width_, E(0));
      std::fill_n(sums_.row_sq + first_column_, width_, 0.0);
    }
  }

  E* coefficients_at(int64_t column) { return recent_ + (per_channel_ ? column - first_column_ : 0); }
  E* row_sq_at(int64_t column) { return sums_.row_sq ? recent_row_sq_ + (column - first_column_) : nullptr; }

  void end_chunk(int64_t n) {
    recent_elements_ += n;
    if (!per_channel_ && recent_elements_ >= kChunk<E>) flush_lanes();
  }

  void end_row() {
    if (++recent_rows_ == kRowsPerSum) flush_channels();
  }

  void end_tile() {
    flush_channels();
    if (per_channel_ || !sums_.coefficients) return;
    flush_lanes();
    for (int k = 0; k < coefficients_; ++k) {
      double sum = 0;
      for (int64_t lane = 0; lane < kLanes<E>; ++lane) sum += lanes_[k * kLanes<E> + lane];
      sums_.coefficients[k] = sum;
    }
  }

 private:
  double* total_of(int k) { return sums_.coefficients + k * columns_ + first_column_; }

  void flush_lanes() {
    for (int64_t i = 0; i < coefficients_ * kLanes<E>; ++i) {
      // Kahan's sum: there are many chunks, and for float64 data a double is no wider than what it adds.
      const double term = static_cast<double>(recent_[i]) - lost_[i];
      const double sum = lanes_[i] + term;
      const double lost = (sum - lanes_[i]) - term;
      lost_[i] = lost == lost ? lost : 0.0;  // an infinite sum has lost nothing
      lanes_[i] = sum;
    }
    std::fill_n(recent_, coefficients_ * kLanes<E>, E(0));
    recent_elements_ = 0;
  }

  void flush_channels() {
    recent_rows_ = 0;
    if (per_channel_) {
      for (int k = 0; k < coefficients_; ++k) {
        if (sums_.coefficients) add_to(total_of(k), recent_ + k * kSumsStride);
      }
    }
    if (sums_.row_sq) add_to(sums_.row_sq + first_column_, recent_row_sq_);
  }

  void add_to(double* total, E* recent) {
    for (int64_t j = 0; j < width_; ++j) total[j] += static_cast<double>(recent[j]);
    std::fill_n(recent, width_, E(0));
  }

  const int coefficients_;
  const bool per_channel_;
  const int64_t first_column_;
  const int64_t width_;
  const int64_t columns_;
  const GradientSums sums_;
  int64_t recent_rows_ = 0;
  int64_t recent_elements_ = 0;
  alignas(64) double lanes_[(kMaxDegree + 1) * kLanes<E>];
  alignas(64) double lost_[(kMaxDegree + 1) * kLanes<E>];
  alignas(64) E recent_[(kMaxDegree + 1) * kSumsStride];
  alignas(64) E recent_row_sq_[kColumnsPerSum];
};

template <class S>
void dreg_backward_tile(const DregBackward& a, const Tile& tile, const GradientSums& wanted) {
  using E = typename ComputeOf<S>::type;
  const bool of_slope = a.grad_norm || a.grad_derivative.data;
  const Gradients gradients = !of_slope ? kOfValue : a.grad_y.data ? kOfBoth : kOfSlope;
  const auto backward = chunk_functions<E>(a.function).backward[gradients];
  const TileParameters<E> parameters(a.function, a.row_sq, tile, a.columns);
  ParameterSums<E> sums(a.function, tile, a.columns, wanted);
  Buffer<E> z_buffer, grad_y_buffer, grad_derivative_buffer, grad_z_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const E grad_norm = a.grad_norm ? static_cast<const E*>(a.grad_norm)[row] : E(0);
    for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
      const int64_t n = std::min(kChunk<E>, tile.column_end - column);
      const S* grad_y = at<S>(a.grad_y, row, column);
      const S* grad_derivative = at<S>(a.grad_derivative, row, column);
      S* grad_z = at<S>(a.grad_z, row, column);
      backward({parameters.coefficients(column), parameters.stride(), read(at<S>(a.z, row, column), n, z_buffer),
                grad_y ? read(grad_y, n, grad_y_buffer) : nullptr,
                grad_derivative ? read(grad_derivative, n, grad_derivative_buffer) : nullptr,
                parameters.row_sq(column), a.grad_norm != nullptr, E(2) * grad_norm,
                target(grad_z, grad_z_buffer), sums.coefficients_at(column), kSumsStride, sums.row_sq_at(column), n});
      finish(grad_z, n, grad_z_buffer);
      sums.end_chunk(n);
    }
    sums.end_row();
  }
  sums.end_tile();
}

// u = g_t + 2 g_q f' z_dot, the gradient that arrives at the pushed tangent; z_dot's gradient is u f', and f' gets u z_dot.
template <class E>
void pull_tangent(const E* slope, const E* z_dot, const E* grad_y_dot, const E* grad_norm, E* grad_z_dot, E* grad_slope,
                  int64_t n) {
  const Vector<E> twice = broadcast(grad_norm ? E(2) * *grad_norm : E(0));
  for_each_vector<E>(0, n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
    const Vector<E> f_1 = load(slope + j, extent);
    const Vector<E> tangent = load(z_dot + j, extent);
    Vector<E> u{};
    if (grad_y_dot) u = load(grad_y_dot + j, extent);
    if (grad_norm) {
      const Vector<E> of_norm = twice * (f_1 * tangent);
      u = grad_y_dot ? u + of_norm : of_norm;
    }
    if (grad_z_dot) store(grad_z_dot + j, u * f_1, extent);
    store(grad_slope + j, load(grad_slope + j, extent) + u * tangent, extent);
  });
}

template <class S>
void tangent_backward_tile(const TangentBackward& a, const Tile& tile, const GradientSums& wanted) {
  using E = typename ComputeOf<S>::type;
  const bool of_slope = a.tangents > 0 && (a.grad_y_dot.data || a.grad_norm);
  const Gradients gradients = !of_slope ? kOfValue : a.grad_y.data ? kOfBoth : kOfSlope;
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function);
  const TileParameters<E> parameters(a.function, nullptr, tile, a.columns);
  ParameterSums<E> sums(a.function, tile, a.columns, wanted);
  Buffer<E> z_buffer, value_buffer, slope_buffer, z_dot_buffer, grad_y_dot_buffer, grad_z_dot_buffer;
  Buffer<E> grad_y_buffer, grad_slope_buffer, grad_z_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
      const int64_t n = std::min(kChunk<E>, tile.column_end - column);
      const E* coefficients = parameters.coefficients(column);
      const E* z = read(at<S>(a.z, row, column), n, z_buffer);
      functions.value_and_norm({coefficients, parameters.stride(), z, value_buffer.data, slope_buffer.data, nullptr, n});
      std::fill_n(grad_slope_buffer.data, n, E(0));
      for (int64_t t = 0; t < a.tangents; ++t) {
        const S* z_dot = at<S>(a.z_dot, row, column) + t * a.z_dot_tangent_stride;
        const S* grad_y_dot = at<S>(a.grad_y_dot, row, column);
        if (grad_y_dot) grad_y_dot += t * a.grad_y_dot_tangent_stride;
        S* grad_z_dot = at<S>(a.grad_z_dot, t * a.rows + row, column);
        if (of_slope) {
          pull_tangent(slope_buffer.data, read(z_dot, n, z_dot_buffer),
                       grad_y_dot ? read(grad_y_dot, n, grad_y_dot_buffer) : nullptr,
                       a.grad_norm ? static_cast<const E*>(a.grad_norm) + t * a.rows + row : nullptr,
                       target(grad_z_dot, grad_z_dot_buffer), grad_slope_buffer.data, n);
          finish(grad_z_dot, n, grad_z_dot_buffer);
        } else if (grad_z_dot) {
          std::memset(grad_z_dot, 0, static_cast<size_t>(n) * sizeof(S));
        }
      }
      const S* grad_y = at<S>(a.grad_y, row, column);
      S* grad_z = at<S>(a.grad_z, row, column);
      functions.backward[gradients]({coefficients, parameters.stride(), z, grad_y ? read(grad_y, n, grad_y_buffer) : nullptr,
                                     of_slope ? grad_slope_buffer.data : nullptr, nullptr, false, E(0),
                                     target(grad_z, grad_z_buffer), sums.coefficients_at(column), kSumsStride, nullptr,
                                     n});
      finish(grad_z, n, grad_z_buffer);
      sums.end_chunk(n);
    }
    sums.end_row();
  }
  sums.end_tile();
}

// ---- the table --------------------------------------------------------------------------------------------------------

inline void dreg_forward(const DregForward& a, const Tile& tile, int64_t split) {
  with_storage(a.type, [&](auto* s) { dreg_forward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, split); });
}
inline void dreg_backward(const DregBackward& a, const Tile& tile, const GradientSums& sums) {
  with_storage(a.type, [&](auto* s) { dreg_backward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, sums); });
}
inline void tangent_forward(const TangentForward& a, const Tile& tile, int64_t split) {
  with_storage(a.type, [&](auto* s) { tangent_forward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, split); });
}
inline void tangent_backward(const TangentBackward& a, const Tile& tile, const GradientSums& sums) {
  with_storage(a.type, [&](auto* s) { tangent_backward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, sums); });
}

template <class E>
void sum_slabs_into(const double* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, E* to) {
  constexpr int64_t kColumns = 512;
  double sums[kColumns];
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = std::min(kColumns, end - first);
    std::fill_n(sums, count, 0.0);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const double* row = from + slab * n + first;
      for (int64_t j = 0; j < count; ++j) sums[j] += row[j];
    }
    for (int64_t j = 0; j < count; ++j) to[first + j] = static_cast<E>(sums[j]);
  }
}

inline void sum_slabs(DataType type, const double* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, void* to) {
  if (type == DataType::float64) return sum_slabs_into(from, slabs, n, begin, end, static_cast<double*>(to));
  sum_slabs_into(from, slabs, n, begin, end, static_cast<float*>(to));
}

constexpr KernelTable kTable{CHAINZRULE_INSTRUCTION_SET, dreg_forward,     dreg_backward,
                             tangent_forward,            tangent_backward, sum_slabs};

}  // namespace chainzrule::CHAINZRULE_TARGET
