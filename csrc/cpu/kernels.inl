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
#include <new>
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
  static constexpr bool kCurved = true;
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
  static constexpr bool kCurved = true;
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
  static constexpr bool kCurved = CHAINZRULE_TARGET::kCurved<Activation>;

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
  // Whether to compute p(relu(z)) in the place of p(z). It is asked for each vector: the processor foresees the answer, which is
  // the same for the whole chunk, and the alternative is a second copy of every chunk function of a polynomial.
  bool rectified;
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
  bool rectified;
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
double forward_chunk(const ForwardChunk<E>& given) {
  using V = Vector<E>;
  const ForwardChunk<E> chunk = given;  // which a store through one of its pointers cannot change
  const Function function(chunk.coefficients, chunk.columns);
  V squares{};
  for_each_block<E>(chunk.n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    V recent{};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      decltype(auto) f = function.at(j, extent);
      const V z = load(chunk.z + j, extent);
      const bool of_relu = Function::kDegree > 0 && chunk.rectified;
      Jet<V> jet = f.jet(of_relu ? rectified(z) : z);
      if (of_relu) jet = where_rising(z, jet);
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
void backward_chunk(const BackwardChunk<E>& given) {
  using V = Vector<E>;
  const BackwardChunk<E> chunk = given;
  constexpr int kDegree = Function::kDegree;
  const Function function(chunk.coefficients, chunk.columns);
  constexpr bool kShared = kDegree > 0 && !Function::kPerChannel;
  const V twice_grad_norm = broadcast(chunk.twice_grad_norm);
  for_each_block<E>(chunk.n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    V shared_sums[kDegree + 1] = {};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      const V z = load(chunk.z + j, extent);
      const bool of_relu = kDegree > 0 && chunk.rectified;
      const V argument = of_relu ? rectified(z) : z;
      Jet<V> jet = jet_of_slope<Function, E>(function, argument, j, extent);
      if constexpr (kSlopeGradient) jet.slope = of_relu ? where_rising(z, jet.slope) : jet.slope;
      V g_y{};
      V h{};
      V grad_z{};
      if constexpr (kValueGradient) {
        g_y = load(chunk.grad_y + j, extent);
        grad_z = Function::kCurved ? g_y * jet.slope : where_rising(z, g_y);
      }
      if constexpr (kSlopeGradient) {
        if (chunk.grad_derivative) h = load(chunk.grad_derivative + j, extent);
        if (chunk.has_grad_norm) {
          if constexpr (Function::kCurved) {
            V norm_part = twice_grad_norm * jet.slope;
            if (chunk.row_sq) norm_part = norm_part * load(chunk.row_sq + j, extent);
            h = chunk.grad_derivative ? h + norm_part : norm_part;
          }
          if (chunk.row_sq_sums) {
            const V square = E(0.5) * twice_grad_norm * jet.slope * jet.slope;
            store(chunk.row_sq_sums + j, load(chunk.row_sq_sums + j, extent) + square, extent);
          }
        }
        h = keep(h, extent);
        if constexpr (Function::kCurved) grad_z = kValueGradient ? grad_z + h * jet.curvature : h * jet.curvature;
      }
      if (of_relu) {
        // The products and not their factors: an infinite gradient, too, is stopped where relu is flat.
        grad_z = where_rising(z, grad_z);
        h = where_rising(z, h);
      }
      if (chunk.grad_z) store(chunk.grad_z + j, grad_z, extent);
      if constexpr (kShared) {
        add_coefficient_gradients<kDegree, kValueGradient, kSlopeGradient>(argument, g_y, h, shared_sums);
      } else if constexpr (kDegree > 0) {
        V sums[kDegree + 1];
        unrolled<kDegree + 1>([&](auto k) { sums[k] = load(chunk.coefficient_sums + k * chunk.sums_stride + j, extent); });
        add_coefficient_gradients<kDegree, kValueGradient, kSlopeGradient>(argument, g_y, h, sums);
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

// ---- rows of a map whose row_sq is the same, as behind a convolution in the middle of an image ------------------------------

template <class E>
struct ForwardRows {
  const E* z;
  E* y;
  const E* row_sq;  // one row
  int64_t rows;  // at most kRowsPerSum
  int64_t width;  // at least one vector
};

template <class E>
struct BackwardRows {
  const E* z;
  const E* grad_y;  // null: absent
  const E* row_sq;  // one row; not read where the function has no curvature
  E twice_grad_norm;
  E* grad_z;     // null: not wanted
  double* sums;  // one row; null: not wanted
  int64_t rows;
  int64_t width;
};

// Calls body(offsets, first_lane) for the vectors of a row, two at a time so that their sums do not wait for each other; offsets[i]
// is where vector i begins. The last vector ends with the row: what it shares with the one before, its lanes below first_lane[i],
// is computed twice and must be summed once.
template <class E, class Body>
CHAINZRULE_INLINE void for_each_pair_of_vectors(int64_t width, const Body& body) {
  const auto offset = [&](int64_t begin) { return std::min(begin, width - kLanes<E>); };
  int64_t begin = 0;
  for (; begin + kLanes<E> < width; begin += 2 * kLanes<E>) {
    const int64_t second = begin + kLanes<E>;
    const std::array<int64_t, 2> offsets{begin, offset(second)};
    body(offsets, std::array<int64_t, 2>{0, second - offsets[1]});
  }
  if (begin < width) body(std::array<int64_t, 1>{offset(begin)}, std::array<int64_t, 1>{begin - offset(begin)});
}

// y, and the sum of f'^2 row_sq.
template <class Function, class E>
double forward_rows(const ForwardRows<E>& given) {
  using V = Vector<E>;
  const ForwardRows<E> rows = given;  // which a store through one of its pointers cannot change
  const Function function(nullptr, 0);
  V total{};
  for_each_pair_of_vectors<E>(rows.width, [&](const auto& offsets, const auto& first_lane) __attribute__((always_inline)) {
    constexpr int kVectors = std::tuple_size_v<std::decay_t<decltype(offsets)>>;
    V squares[kVectors] = {};
    for (int64_t row = 0; row < rows.rows; ++row) {
      unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
        const int64_t j = row * rows.width + offsets[i];
        const Jet<V> jet = function.at(j, Whole{}).jet(load(rows.z + j, Whole{}));
        store(rows.y + j, jet.value, Whole{});
        squares[i] += jet.slope * jet.slope;
      });
    }
    unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
      total += keep_from(squares[i] * load(rows.row_sq + offsets[i], Whole{}), first_lane[i]);
    });
  });
  return sum_of_lanes<E>(total);
}

// grad_z = g_y f' + 2 g_s row_sq f' f''; adds g_s f'^2 to the sums.
template <class Function, class E, bool kValueGradient>
void backward_rows(const BackwardRows<E>& given) {
  using V = Vector<E>;
  const BackwardRows<E> rows = given;
  const Function function(nullptr, 0);
  for_each_pair_of_vectors<E>(rows.width, [&](const auto& offsets, const auto& first_lane) __attribute__((always_inline)) {
    constexpr int kVectors = std::tuple_size_v<std::decay_t<decltype(offsets)>>;
    V squares[kVectors] = {};
    V scales[kVectors] = {};
    if constexpr (Function::kCurved) {
      unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
        scales[i] = rows.twice_grad_norm * load(rows.row_sq + offsets[i], Whole{});
      });
    }
    for (int64_t row = 0; row < rows.rows; ++row) {
      unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
        const int64_t j = row * rows.width + offsets[i];
        const V z = load(rows.z + j, Whole{});
        const Jet<V> jet = function.at(j, Whole{}).jet(z);
        V grad_z{};
        if constexpr (kValueGradient) {
          const V grad_y = load(rows.grad_y + j, Whole{});
          grad_z = Function::kCurved ? grad_y * jet.slope : where_rising(z, grad_y);
        }
        if constexpr (Function::kCurved) grad_z += scales[i] * jet.slope * jet.curvature;
        if (rows.grad_z) store(rows.grad_z + j, grad_z, Whole{});
        squares[i] += jet.slope * jet.slope;
      });
    }
    if (!rows.sums) return;
    unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
      E lanes[kLanes<E>];
      store(lanes, keep_from(E(0.5) * rows.twice_grad_norm * squares[i], first_lane[i]), Whole{});
      double* sums = rows.sums + offsets[i];
      for (int64_t lane = 0; lane < kLanes<E>; ++lane) sums[lane] += static_cast<double>(lanes[lane]);
    });
  });
}

// ---- the choice of the chunk functions ------------------------------------------------------------------------------

enum Gradients { kOfValue, kOfSlope, kOfBoth };

template <class E>
struct ChunkFunctions {
  double (*value)(const ForwardChunk<E>&);
  double (*value_and_norm)(const ForwardChunk<E>&);
  std::array<void (*)(const BackwardChunk<E>&), 3> backward;  // by Gradients
  bool curved;
  // Of an activation.
  double (*rows)(const ForwardRows<E>&) = nullptr;
  std::array<void (*)(const BackwardRows<E>&), 3> backward_rows = {};  // by Gradients
};

template <class Function, class E>
constexpr ChunkFunctions<E> chunk_functions_of() {
  return {forward_chunk<Function, E, false>,
          forward_chunk<Function, E, true>,
          {backward_chunk<Function, E, true, false>, backward_chunk<Function, E, false, true>,
           backward_chunk<Function, E, true, true>},
          Function::kCurved};
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
    if (index++ == activation) {
      using Function = FixedActivation<decltype(kind), E>;
      result = chunk_functions_of<Function, E>();
      result.rows = forward_rows<Function, E>;
      result.backward_rows = {nullptr, backward_rows<Function, E, false>, backward_rows<Function, E, true>};
    }
  });
  return result;
}

template <class E>
ChunkFunctions<E> chunk_functions(const FunctionSpec& function, const ChannelOrder& order) {
  // With the channels outermost a chunk lies within one channel, whose polynomial its elements share.
  return function.activation >= 0 ? activation_functions<E>(function.activation)
                                  : polynomial_functions<E>(function.degree, function.per_channel && !order.outermost);
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

template <class S, class E>
CHAINZRULE_INLINE void write(const E* from, int64_t n, S* to) {
  if constexpr (std::is_same_v<S, E>) {
    std::copy_n(from, n, to);
  } else {
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j]);
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

// Memory aligned to a cache line.
template <class E>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<E*>(::operator new(static_cast<size_t>(count) * sizeof(E), std::align_val_t{64}))) {}
  E* get() const { return data_.get(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  struct Free {
    void operator()(E* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<E, Free> data_;
};

// A part of a row that one chunk can take: its parameters stand side by side.
struct Piece {
  int64_t column;
  int64_t n;
  int64_t offset;   // channels innermost: where its first parameter stands in the tile's window of parameters
  int64_t channel;  // channels outermost: that of every element
};

// How the columns of a tile meet the parameters of their channels.
//
// Channels innermost: the tile has a window, the parameters of one position or, so that chunks of images with few channels need
// not be short, of several. Channels outermost: a piece ends with its channel.
class TileColumns {
 public:
  TileColumns(const ChannelOrder& order, const Tile& tile, bool parameters_per_channel)
      : order_(order),
        begin_(tile.column_begin),
        end_(tile.column_end),
        outermost_(order.outermost && parameters_per_channel),
        window_(end_ - begin_),
        phase_(order.positions > 1 && !order.outermost && order.channels > 0 ? begin_ % order.channels : begin_) {
    if (parameters_per_channel && !outermost_ && order.positions > 1) {
      window_ = std::min(window_, std::max<int64_t>(1, kColumnsPerSum / order.channels) * order.channels);
    }
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  int64_t width() const { return end_ - begin_; }
  int64_t channels() const { return order_.channels; }
  bool outermost() const { return outermost_; }
  int64_t window() const { return window_; }

  template <class E>
  CHAINZRULE_INLINE Piece piece(int64_t column) const {
    if (outermost_) {
      const int64_t channel = column / order_.positions;
      return {column, std::min({kChunk<E>, end_ - column, (channel + 1) * order_.positions - column}), 0, channel};
    }
    int64_t offset = column - begin_;
    if (offset >= window_) offset %= window_;
    return {column, std::min({kChunk<E>, end_ - column, window_ - offset}), offset, 0};
  }

  // Whether the window holds each channel at most once, in the order of the parameters.
  bool window_in_place() const { return phase_ + window_ <= order_.channels; }
  int64_t phase() const { return phase_; }

  // Calls run(offset, channel, count) for each stretch of the window whose channels follow one another.
  template <class Run>
  void for_each_stretch(const Run& run) const {
    for (int64_t offset = 0; offset < window_;) {
      const int64_t channel = (phase_ + offset) % order_.channels;
      const int64_t count = std::min(window_ - offset, order_.channels - channel);
      run(offset, channel, count);
      offset += count;
    }
  }

 private:
  const ChannelOrder order_;
  const int64_t begin_;
  const int64_t end_;
  const bool outermost_;
  int64_t window_;
  const int64_t phase_;  // the channel of the first column
};

// Between arrays that a loop reads side by side: not a multiple of 4096 bytes, at which they would share the lines of the
// first-level cache and wait for each other's stores.
constexpr int64_t kSkew = 48;

inline int64_t skewed(int64_t width) { return (width + kColumnsPerSum - 1) / kColumnsPerSum * kColumnsPerSum + kSkew; }

// The parameters of the channels of a tile, as its chunks read them: copied into the window, side by side with a skew, where
// the tile is large enough to make that worth while or the window repeats them, and where they lie otherwise.
template <class E>
class TileParameters {
 public:
  TileParameters(const FunctionSpec& function, const RowSq& row_sq, const Tile& tile, const TileColumns& columns)
      : columns_(columns),
        coefficients_(static_cast<const E*>(function.coefficients)),
        row_sq_(static_cast<const E*>(row_sq.data)),
        coefficient_count_(function.per_channel ? function.degree + 1 : 0),
        row_sq_per_channel_(row_sq.per_channel),
        stride_(columns.channels()) {
    if (columns.outermost() || columns.window() == 0) return;
    const bool copies_row_sq = row_sq_ && row_sq_per_channel_;
    if (coefficient_count_ == 0 && !copies_row_sq) return;
    if (tile.row_end - tile.row_begin < 8 && columns.window_in_place()) {
      if (coefficient_count_ > 0) coefficients_ += columns.phase();
      if (copies_row_sq) row_sq_ += columns.phase();
      return;
    }
    const int64_t stride = skewed(columns.window());
    copy_ = AlignedBuffer<E>((coefficient_count_ + 1) * stride);
    columns.for_each_stretch([&](int64_t offset, int64_t channel, int64_t count) {
      for (int64_t k = 0; k < coefficient_count_; ++k) {
        std::copy_n(coefficients_ + k * stride_ + channel, count, copy_.get() + k * stride + offset);
      }
      if (copies_row_sq) std::copy_n(row_sq_ + channel, count, copy_.get() + coefficient_count_ * stride + offset);
    });
    if (copies_row_sq) row_sq_ = copy_.get() + coefficient_count_ * stride;
    if (coefficient_count_ > 0) {
      coefficients_ = copy_.get();
      stride_ = stride;
    }
  }

  // To be called for each piece before the others.
  CHAINZRULE_INLINE void begin_piece(const Piece& piece) {
    if (columns_.outermost() && piece.channel != channel_) begin_channel(piece.channel);
  }

  const E* coefficients(const Piece& piece) const {
    if (coefficient_count_ == 0) return coefficients_;
    return columns_.outermost() ? of_channel_ : coefficients_ + piece.offset;
  }
  int64_t stride() const { return stride_; }
  const E* row_sq(const Piece& piece) const {
    if (!row_sq_) return nullptr;
    if (!row_sq_per_channel_) return row_sq_ + piece.column;
    return columns_.outermost() ? row_sq_of_channel_.data : row_sq_ + piece.offset;
  }

 private:
  void begin_channel(int64_t channel) {
    channel_ = channel;
    for (int64_t k = 0; k < coefficient_count_; ++k) of_channel_[k] = coefficients_[k * stride_ + channel];
    if (row_sq_ && row_sq_per_channel_) {
      std::fill_n(row_sq_of_channel_.data, std::min(kChunk<E>, columns_.width()), row_sq_[channel]);
    }
  }

  const TileColumns& columns_;
  const E* coefficients_;
  const E* row_sq_;
  const int64_t coefficient_count_;  // for each channel
  const bool row_sq_per_channel_;
  int64_t stride_;
  int64_t channel_ = -1;
  E of_channel_[kMaxDegree + 1];
  Buffer<E> row_sq_of_channel_;
  AlignedBuffer<E> copy_;
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
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function, a.order);
  const TileColumns columns(a.order, tile, a.function.per_channel || (a.row_sq.data && a.row_sq.per_channel));
  TileParameters<E> parameters(a.function, a.row_sq, tile, columns);
  Buffer<E> z_buffer, y_buffer, derivative_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    double norm = 0;
    for (int64_t column = tile.column_begin; column < tile.column_end;) {
      const Piece piece = columns.piece<E>(column);
      const int64_t n = piece.n;
      parameters.begin_piece(piece);
      S* y = at<S>(a.y, row, column);
      S* derivative = at<S>(a.derivative, row, column);
      const E* z = a.z_is_wide ? at<E>(a.z, row, column) : read(at<S>(a.z, row, column), n, z_buffer);
      if (S* kept = at<S>(a.kept_z, row, column)) write(z, n, kept);
      const ForwardChunk<E> chunk{parameters.coefficients(piece),
                                  parameters.stride(),
                                  a.function.rectified,
                                  z,
                                  target(y, y_buffer),
                                  target(derivative, derivative_buffer),
                                  parameters.row_sq(piece),
                                  n};
      norm += (wants_norm ? functions.value_and_norm : functions.value)(chunk);
      finish(y, n, y_buffer);
      finish(derivative, n, derivative_buffer);
      column += n;
    }
    if (wants_norm) put_norm<E>(a.norm, a.norm_partials, row, a.splits, split, norm);
  }
}

// Rows of one channel of an image that have the same row_sq.
struct AlikeRows {
  int64_t column;  // where they begin, in the image
  int64_t rows;
  int64_t place;  // of their row_sq, and of the sums for its gradient

  int64_t elements(const RowKinds& kinds) const { return rows * kinds.width; }
};

// Calls run for the rows of the tile, which holds whole ones, as many at once as are alike and a buffer for half precision takes.
template <class S, class Run>
void for_each_alike_rows(const RowKinds& kinds, const ChannelOrder& order, const Tile& tile, const Run& run) {
  using E = typename ComputeOf<S>::type;
  const int64_t rows_of_channel = order.positions / kinds.width;
  const int64_t room = std::is_same_v<S, E> ? kRowsPerSum : std::min(kRowsPerSum, kChunk<E> / kinds.width);
  int64_t channel = tile.column_begin / order.positions;
  int64_t row = (tile.column_begin - channel * order.positions) / kinds.width;
  for (int64_t column = tile.column_begin; column < tile.column_end;) {
    const int32_t kind = kinds.kind_of_row[row];
    const int64_t most = std::min({room, rows_of_channel - row, (tile.column_end - column) / kinds.width});
    AlikeRows alike{column, 1, (channel * kinds.kinds + kind) * kinds.width};
    while (alike.rows < most && kinds.kind_of_row[row + alike.rows] == kind) ++alike.rows;
    run(alike);
    column += alike.elements(kinds);
    row += alike.rows;
    if (row == rows_of_channel) {
      row = 0;
      ++channel;
    }
  }
}

template <class S>
void dreg_forward_rows(const DregForward& a, const Tile& tile, int64_t split) {
  using E = typename ComputeOf<S>::type;
  const RowKinds& kinds = *a.row_sq.rows;
  const auto forward = activation_functions<E>(a.function.activation).rows;
  Buffer<E> z_buffer, y_buffer;
  for (int64_t image = tile.row_begin; image < tile.row_end; ++image) {
    double norm = 0;
    for_each_alike_rows<S>(kinds, a.order, tile, [&](const AlikeRows& alike) {
      const int64_t n = alike.elements(kinds);
      S* y = at<S>(a.y, image, alike.column);
      norm += forward({read(at<S>(a.z, image, alike.column), n, z_buffer), target(y, y_buffer),
                       static_cast<const E*>(a.row_sq.data) + alike.place, alike.rows, kinds.width});
      finish(y, n, y_buffer);
    });
    put_norm<E>(a.norm, a.norm_partials, image, a.splits, split, norm);
  }
}

// y_dot = slope * z_dot, and where there is a relu 0 where it is flat, whatever z_dot is; returns the sum of its squares.
template <class E, bool kOfRelu>
double push_tangent(const E* z, const E* slope, const E* z_dot, E* y_dot, int64_t n) {
  Vector<E> squares{};
  for_each_block<E>(n, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    Vector<E> recent{};
    for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
      Vector<E> pushed = load(slope + j, extent) * load(z_dot + j, extent);
      if constexpr (kOfRelu) pushed = where_rising(load(z + j, extent), pushed);
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
  const ChannelOrder order{a.columns};
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function, order);
  const TileColumns columns(order, tile, a.function.per_channel);
  const TileParameters<E> parameters(a.function, RowSq{}, tile, columns);
  const auto push = a.function.rectified || !functions.curved ? push_tangent<E, true> : push_tangent<E, false>;
  Buffer<E> z_buffer, y_buffer, slope_buffer, z_dot_buffer, y_dot_buffer;
  std::array<double, kMaxTangentsAtOnce> norms;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    // A row's norms are kept on the stack, so tangents beyond kMaxTangentsAtOnce take another turn over the row.
    for (int64_t first = 0; first == 0 || first < a.tangents; first += kMaxTangentsAtOnce) {
      const int64_t last = std::min(first + kMaxTangentsAtOnce, a.tangents);
      norms.fill(0);
      for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
        const Piece piece = columns.piece<E>(column);
        const int64_t n = piece.n;
        S* y = at<S>(a.y, row, column);
        const E* z = read(at<S>(a.z, row, column), n, z_buffer);
        functions.value_and_norm({parameters.coefficients(piece), parameters.stride(), a.function.rectified, z,
                                  target(y, y_buffer), slope_buffer.data, nullptr, n});
        if (first == 0) finish(y, n, y_buffer);
        for (int64_t t = first; t < last; ++t) {
          const S* z_dot = at<S>(a.z_dot, row, column) + t * a.z_dot_tangent_stride;
          S* y_dot = at<S>(a.y_dot, t * a.rows + row, column);
          norms[t - first] += push(z, slope_buffer.data, read(z_dot, n, z_dot_buffer), target(y_dot, y_dot_buffer), n);
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

// The sums that a backward tile keeps for the parameters: in the compute type for one chunk (shared coefficients, or channels
// outermost) or for kRowsPerSum rows or positions (one sum for each channel), then in double; or for the tile (one for each column).
template <class E>
class ParameterSums {
 public:
  ParameterSums(const FunctionSpec& function, const ChannelOrder& order, const TileColumns& columns, GradientSums sums)
      : columns_(columns),
        sums_(sums),
        coefficients_(function.activation >= 0 ? 0 : function.degree + 1),
        lanes_per_channel_(function.per_channel && columns.outermost()),
        window_per_channel_(function.per_channel && !columns.outermost()),
        stride_(skewed(columns.window())) {
    const int64_t channels = columns.channels();
    const int64_t first = sums.of_own_channels ? columns.begin() / order.positions : 0;
    const int64_t count = sums.of_own_channels ? columns.width() / order.positions : channels;
    if (std::is_same_v<E, double> && order.positions > 1 && !columns.outermost()) {
      lost_window_ = AlignedBuffer<double>((coefficients_ + 1) * channels);
      std::fill_n(lost_window_.get(), (coefficients_ + 1) * channels, 0.0);
    }
    if (window_per_channel_) {
      recent_window_ = AlignedBuffer<E>(coefficients_ * stride_);
      std::fill_n(recent_window_.get(), coefficients_ * stride_, E(0));
    } else {
      std::fill_n(recent_, coefficients_ * kLanes<E>, E(0));
      std::fill_n(lanes_, coefficients_ * kLanes<E>, 0.0);
      std::fill_n(lost_, coefficients_ * kLanes<E>, 0.0);
    }
    if (sums_.coefficients && function.per_channel) {
      if (order.sums_columns()) {
        for (int k = 0; k < coefficients_; ++k) std::fill_n(total_of(k) + first, count, 0.0);
      } else {
        for (int k = 0; k < coefficients_; ++k) std::fill_n(total_of(k) + columns.begin(), columns.width(), 0.0);
      }
    }
    if (sums_.row_sq_columns) std::fill_n(columns_of_row_sq(), columns.width(), E(0));
    if (!sums_.row_sq) return;
    const int64_t room = columns.outermost() ? kChunk<E> : columns.window();
    recent_row_sq_ = AlignedBuffer<E>(room);
    std::fill_n(recent_row_sq_.get(), room, E(0));
    if (order.sums_columns()) {
      std::fill_n(sums_.row_sq + first, count, 0.0);
    } else {
      std::fill_n(sums_.row_sq + columns.begin(), columns.width(), 0.0);
    }
  }

  // Where a chunk adds to the sums of its columns; coefficient k + 1 follows `stride` elements after coefficient k.
  E* coefficients_at(const Piece& piece) { return window_per_channel_ ? recent_window_.get() + piece.offset : recent_; }
  int64_t stride() const { return stride_; }
  E* row_sq_at(const Piece& piece) {
    if (sums_.row_sq_columns) return columns_of_row_sq() + (piece.column - columns_.begin());
    return sums_.row_sq ? recent_row_sq_.get() + piece.offset : nullptr;
  }

  void end_piece(const Piece& piece) {
    if (columns_.outermost()) return end_piece_of_channel(piece);
    recent_elements_ += piece.n;
    if (!window_per_channel_ && recent_elements_ >= kChunk<E>) flush_lanes();
    const bool window_ends = piece.offset + piece.n == columns_.window() || piece.column + piece.n == columns_.end();
    if (window_ends && ++recent_windows_ == kRowsPerSum) flush_window();
  }

  void end_tile() {
    flush_window();
    if (window_per_channel_ || lanes_per_channel_ || !sums_.coefficients) return;
    flush_lanes();
    for (int k = 0; k < coefficients_; ++k) {
      double sum = 0;
      for (int64_t lane = 0; lane < kLanes<E>; ++lane) sum += lanes_[k * kLanes<E> + lane];
      sums_.coefficients[k] = sum;
    }
  }

 private:
  // Kahan's sum: there are many chunks, and for float64 data a double is no wider than what it adds.
  static void add_compensated(double& total, double& lost, double value) {
    const double term = value - lost;
    const double sum = total + term;
    const double newly_lost = (sum - total) - term;
    lost = newly_lost == newly_lost ? newly_lost : 0.0;  // an infinite sum has lost nothing
    total = sum;
  }

  E* columns_of_row_sq() const { return static_cast<E*>(sums_.row_sq_columns) + columns_.begin(); }
  double* total_of(int k) { return sums_.coefficients + k * columns_.channels(); }

  void flush_lanes() {
    for (int64_t i = 0; i < coefficients_ * kLanes<E>; ++i) {
      add_compensated(lanes_[i], lost_[i], static_cast<double>(recent_[i]));
    }
    std::fill_n(recent_, coefficients_ * kLanes<E>, E(0));
    recent_elements_ = 0;
  }

  // All of the piece's elements belong to one channel.
  void end_piece_of_channel(const Piece& piece) {
    if (lanes_per_channel_) {
      for (int k = 0; k < coefficients_; ++k) {
        if (sums_.coefficients) total_of(k)[piece.channel] += sum_of_lanes<E>(load(recent_ + k * kLanes<E>, Whole{}));
        store(recent_ + k * kLanes<E>, Vector<E>{}, Whole{});
      }
    } else {
      recent_elements_ += piece.n;
      if (recent_elements_ >= kChunk<E>) flush_lanes();
    }
    if (sums_.row_sq) {
      E* recent = recent_row_sq_.get();
      Vector<E> sum{};
      for_each_vector<E>(0, piece.n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
        sum += load(recent + j, extent);
        store(recent + j, Vector<E>{}, extent);
      });
      sums_.row_sq[piece.channel] += sum_of_lanes<E>(sum);
    }
  }

  void flush_window() {
    recent_windows_ = 0;
    if (columns_.outermost()) return;
    columns_.for_each_stretch([&](int64_t offset, int64_t channel, int64_t count) {
      for (int k = 0; window_per_channel_ && sums_.coefficients && k < coefficients_; ++k) {
        add_to(total_of(k) + channel, recent_window_.get() + k * stride_ + offset, count, lost_at(k, channel));
      }
      if (sums_.row_sq) {
        add_to(sums_.row_sq + channel, recent_row_sq_.get() + offset, count, lost_at(coefficients_, channel));
      }
    });
  }

  static void add_to(double* total, E* recent, int64_t count, double* lost) {
    if (lost) {
      for (int64_t j = 0; j < count; ++j) add_compensated(total[j], lost[j], static_cast<double>(recent[j]));
    } else {
      for (int64_t j = 0; j < count; ++j) total[j] += static_cast<double>(recent[j]);
    }
    std::fill_n(recent, count, E(0));
  }

  // What the totals of the window have lost: kept where they are no wider than what they add, and many positions add to them.
  double* lost_at(int k, int64_t channel) {
    return lost_window_ ? lost_window_.get() + k * columns_.channels() + channel : nullptr;
  }

  const TileColumns& columns_;
  const GradientSums sums_;
  const int coefficients_;
  const bool lanes_per_channel_;   // channels outermost: a channel's sums are those of its pieces
  const bool window_per_channel_;  // channels innermost: a sum for each column of the window
  const int64_t stride_;
  int64_t recent_windows_ = 0;
  int64_t recent_elements_ = 0;
  alignas(64) double lanes_[(kMaxDegree + 1) * kLanes<E>];
  alignas(64) double lost_[(kMaxDegree + 1) * kLanes<E>];
  alignas(64) E recent_[(kMaxDegree + 1) * kLanes<E>];
  AlignedBuffer<double> lost_window_;
  AlignedBuffer<E> recent_window_;
  AlignedBuffer<E> recent_row_sq_;
};

template <class S>
void dreg_backward_tile(const DregBackward& a, const Tile& tile, const GradientSums& wanted) {
  using E = typename ComputeOf<S>::type;
  const bool of_slope = a.grad_norm || a.grad_derivative.data;
  const Gradients gradients = !of_slope ? kOfValue : a.grad_y.data ? kOfBoth : kOfSlope;
  const auto backward = chunk_functions<E>(a.function, a.order).backward[gradients];
  const TileColumns columns(a.order, tile,
                            a.function.per_channel || ((a.row_sq.data || wanted.row_sq) && a.row_sq.per_channel));
  TileParameters<E> parameters(a.function, a.row_sq, tile, columns);
  ParameterSums<E> sums(a.function, a.order, columns, wanted);
  Buffer<E> z_buffer, grad_y_buffer, grad_derivative_buffer, grad_z_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    const E grad_norm = a.grad_norm ? static_cast<const E*>(a.grad_norm)[row] : E(0);
    for (int64_t column = tile.column_begin; column < tile.column_end;) {
      const Piece piece = columns.piece<E>(column);
      const int64_t n = piece.n;
      parameters.begin_piece(piece);
      const S* grad_y = at<S>(a.grad_y, row, column);
      const S* grad_derivative = at<S>(a.grad_derivative, row, column);
      S* grad_z = at<S>(a.grad_z, row, column);
      backward({parameters.coefficients(piece), parameters.stride(), a.function.rectified,
                read(at<S>(a.z, row, column), n, z_buffer),
                grad_y ? read(grad_y, n, grad_y_buffer) : nullptr,
                grad_derivative ? read(grad_derivative, n, grad_derivative_buffer) : nullptr,
                parameters.row_sq(piece), a.grad_norm != nullptr, E(2) * grad_norm,
                target(grad_z, grad_z_buffer), sums.coefficients_at(piece), sums.stride(), sums.row_sq_at(piece), n});
      finish(grad_z, n, grad_z_buffer);
      sums.end_piece(piece);
      column += n;
    }
  }
  sums.end_tile();
}

template <class S>
void dreg_backward_rows(const DregBackward& a, const Tile& tile, const GradientSums& wanted) {
  using E = typename ComputeOf<S>::type;
  const RowKinds& kinds = *a.row_sq.rows;
  const auto backward = activation_functions<E>(a.function.activation).backward_rows[a.grad_y.data ? kOfBoth : kOfSlope];
  if (wanted.row_sq) {
    const int64_t first = wanted.of_own_channels ? tile.column_begin / a.order.positions : 0;
    const int64_t last = wanted.of_own_channels ? tile.column_end / a.order.positions : a.order.channels;
    const int64_t of_channel = kinds.kinds * kinds.width;
    std::fill(wanted.row_sq + first * of_channel, wanted.row_sq + last * of_channel, 0.0);
  }
  const E* row_sq = static_cast<const E*>(a.row_sq.data);
  Buffer<E> z_buffer, grad_y_buffer, grad_z_buffer;
  for (int64_t image = tile.row_begin; image < tile.row_end; ++image) {
    const E grad_norm = static_cast<const E*>(a.grad_norm)[image];
    for_each_alike_rows<S>(kinds, a.order, tile, [&](const AlikeRows& alike) {
      const int64_t n = alike.elements(kinds);
      const S* grad_y = at<S>(a.grad_y, image, alike.column);
      S* grad_z = at<S>(a.grad_z, image, alike.column);
      backward({read(at<S>(a.z, image, alike.column), n, z_buffer), grad_y ? read(grad_y, n, grad_y_buffer) : nullptr,
                row_sq ? row_sq + alike.place : nullptr, E(2) * grad_norm, target(grad_z, grad_z_buffer),
                wanted.row_sq ? wanted.row_sq + alike.place : nullptr, alike.rows, kinds.width});
      finish(grad_z, n, grad_z_buffer);
    });
  }
}

// u = g_t + 2 g_q f' z_dot, the gradient that arrives at the pushed tangent; z_dot's gradient is u f', and where there is a relu
// 0 where it is flat, whatever u is; f' gets u z_dot.
template <class E, bool kOfRelu>
void pull_tangent(const E* z, const E* slope, const E* z_dot, const E* grad_y_dot, const E* grad_norm, E* grad_z_dot, E* grad_slope,
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
    if (grad_z_dot) {
      Vector<E> pulled = u * f_1;
      if constexpr (kOfRelu) pulled = where_rising(load(z + j, extent), pulled);
      store(grad_z_dot + j, pulled, extent);
    }
    store(grad_slope + j, load(grad_slope + j, extent) + u * tangent, extent);
  });
}

template <class S>
void tangent_backward_tile(const TangentBackward& a, const Tile& tile, const GradientSums& wanted) {
  using E = typename ComputeOf<S>::type;
  const bool of_slope = a.tangents > 0 && (a.grad_y_dot.data || a.grad_norm);
  const Gradients gradients = !of_slope ? kOfValue : a.grad_y.data ? kOfBoth : kOfSlope;
  const ChannelOrder order{a.columns};
  const ChunkFunctions<E> functions = chunk_functions<E>(a.function, order);
  const TileColumns columns(order, tile, a.function.per_channel);
  const TileParameters<E> parameters(a.function, RowSq{}, tile, columns);
  ParameterSums<E> sums(a.function, order, columns, wanted);
  const auto pull = a.function.rectified || !functions.curved ? pull_tangent<E, true> : pull_tangent<E, false>;
  Buffer<E> z_buffer, value_buffer, slope_buffer, z_dot_buffer, grad_y_dot_buffer, grad_z_dot_buffer;
  Buffer<E> grad_y_buffer, grad_slope_buffer, grad_z_buffer;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    for (int64_t column = tile.column_begin; column < tile.column_end; column += kChunk<E>) {
      const Piece piece = columns.piece<E>(column);
      const int64_t n = piece.n;
      const E* coefficients = parameters.coefficients(piece);
      const E* z = read(at<S>(a.z, row, column), n, z_buffer);
      functions.value_and_norm({coefficients, parameters.stride(), a.function.rectified, z, value_buffer.data,
                                slope_buffer.data, nullptr, n});
      std::fill_n(grad_slope_buffer.data, n, E(0));
      for (int64_t t = 0; t < a.tangents; ++t) {
        const S* z_dot = at<S>(a.z_dot, row, column) + t * a.z_dot_tangent_stride;
        const S* grad_y_dot = at<S>(a.grad_y_dot, row, column);
        if (grad_y_dot) grad_y_dot += t * a.grad_y_dot_tangent_stride;
        S* grad_z_dot = at<S>(a.grad_z_dot, t * a.rows + row, column);
        if (of_slope) {
          pull(z, slope_buffer.data, read(z_dot, n, z_dot_buffer),
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
      functions.backward[gradients]({coefficients, parameters.stride(), a.function.rectified, z,
                                     grad_y ? read(grad_y, n, grad_y_buffer) : nullptr, of_slope ? grad_slope_buffer.data : nullptr, nullptr, false, E(0),
                                     target(grad_z, grad_z_buffer), sums.coefficients_at(piece), sums.stride(), nullptr,
                                     n});
      finish(grad_z, n, grad_z_buffer);
      sums.end_piece(piece);
    }
  }
  sums.end_tile();
}

// ---- the table --------------------------------------------------------------------------------------------------------

inline void dreg_forward(const DregForward& a, const Tile& tile, int64_t split) {
  with_storage(a.type, [&](auto* s) {
    using S = std::remove_pointer_t<decltype(s)>;
    a.row_sq.rows ? dreg_forward_rows<S>(a, tile, split) : dreg_forward_tile<S>(a, tile, split);
  });
}
inline void dreg_backward(const DregBackward& a, const Tile& tile, const GradientSums& sums) {
  with_storage(a.type, [&](auto* s) {
    using S = std::remove_pointer_t<decltype(s)>;
    // The norms of an empty batch are nowhere, and sums may be wanted all the same.
    const bool of_rows = a.row_sq.rows && (a.grad_norm || sums.row_sq);
    of_rows ? dreg_backward_rows<S>(a, tile, sums) : dreg_backward_tile<S>(a, tile, sums);
  });
}
// Whether rows of that width are taken at once.
inline bool takes_rows(DataType type, int64_t width) {
  bool takes = false;
  with_storage(type, [&](auto* s) {
    using E = typename ComputeOf<std::remove_pointer_t<decltype(s)>>::type;
    takes = width >= kLanes<E> && width <= kChunk<E>;
  });
  return takes;
}
inline void tangent_forward(const TangentForward& a, const Tile& tile, int64_t split) {
  with_storage(a.type, [&](auto* s) { tangent_forward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, split); });
}
inline void tangent_backward(const TangentBackward& a, const Tile& tile, const GradientSums& sums) {
  with_storage(a.type, [&](auto* s) { tangent_backward_tile<std::remove_pointer_t<decltype(s)>>(a, tile, sums); });
}

template <class From, class E>
void sum_slabs_into(const From* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, E* to) {
  constexpr int64_t kColumns = 512;
  double sums[kColumns];
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = std::min(kColumns, end - first);
    std::fill_n(sums, count, 0.0);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const From* row = from + slab * n + first;
      for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < count; ++j) to[first + j] = static_cast<E>(sums[j]);
  }
}

inline void sum_slabs(DataType type, const double* from, int64_t slabs, int64_t n, int64_t begin, int64_t end, void* to) {
  if (type == DataType::float64) return sum_slabs_into(from, slabs, n, begin, end, static_cast<double*>(to));
  sum_slabs_into(from, slabs, n, begin, end, static_cast<float*>(to));
}

inline void sum_column_slabs(DataType type, const void* from, int64_t slabs, int64_t n, int64_t begin, int64_t end,
                             void* to) {
  if (type == DataType::float64) {
    return sum_slabs_into(static_cast<const double*>(from), slabs, n, begin, end, static_cast<double*>(to));
  }
  sum_slabs_into(static_cast<const float*>(from), slabs, n, begin, end, static_cast<float*>(to));
}

}  // namespace chainzrule::CHAINZRULE_TARGET

#include "cpu/squared_taps.inl"

namespace chainzrule::CHAINZRULE_TARGET {

constexpr KernelTable kTable{CHAINZRULE_INSTRUCTION_SET, dreg_forward, dreg_backward, takes_rows, tangent_forward,
                             tangent_backward, sum_slabs, sum_column_slabs, squared_taps, squared_taps_backward};

}  // namespace chainzrule::CHAINZRULE_TARGET
