// What happens to a tile of convolution sums before it leaves the chip: bias, polynomial, the stores of y and s, and the
// partial sums of the Jacobian norm. One class in the form of CUTLASS's epilogue visitors
// (cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h).
#pragma once

#include <cutlass/array.h>
#include <cutlass/fast_math.h>
#include <cutlass/gemm_coord.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/convolution.h"
#include "math/polynomial.h"

namespace chainzrule {

// Which rows and columns of its tile a thread visits. The rows of CUTLASS's output iterators, which walk from step to step
// (PredicatedTileIterator::operator++), as a function of the step.
template <class ThreadMap, int kTileColumns>
struct TileWalk {
  static constexpr int kRowsPerStep = ThreadMap::Iterations::kRow * ThreadMap::Iterations::kGroup * ThreadMap::Iterations::kCluster;
  static constexpr int kColumnAccesses = ThreadMap::Iterations::kColumn;
  static constexpr int kVector = ThreadMap::kElementsPerAccess;
  // Neighbouring lanes that share a row.
  static constexpr int kLanesPerRow = ThreadMap::Detail::kAccessWidth;

  static_assert(ThreadMap::Count::kCluster == 1 && ThreadMap::Count::kColumn == 1, "the walk below knows no more");
  // A row's sum then has one writer: the first of its lanes.
  static_assert(kLanesPerRow * kVector * kColumnAccesses == kTileColumns, "the lanes of a row span the tile");

  CUTLASS_HOST_DEVICE static int row(int step, int row_index) {
    using Shape = typename ThreadMap::Shape;
    using Count = typename ThreadMap::Count;
    const int group = step / Count::kRow;
    const int first = step % Count::kRow * Shape::kRow + group * Shape::kGroup * Shape::kRow * Count::kRow;
    return first + ThreadMap::iteration_offset(row_index * kColumnAccesses).row();
  }
  CUTLASS_HOST_DEVICE static int column(int access) { return access * ThreadMap::Delta::kColumn; }
};

// Element is that of y and s.
template <class ThreadMap, class Element, int kTileColumns>
class PolynomialEpilogue {
  using Walk = TileWalk<ThreadMap, kTileColumns>;
  static constexpr int kVector = Walk::kVector;
  using Floats = cutlass::Array<float, kVector>;

 public:
  struct Params {
    int rows = 0;     // of the output matrix
    int columns = 0;  // filters
    cutlass::FastDivmod positions;  // rows of one sample
    const float* bias = nullptr;
    const float* coefficients = nullptr;
    int degree = 0;
    bool per_channel = false;
    const float* tap_sq = nullptr;
    int tap_sq_stride = 0;  // from position to position
    Element* y = nullptr;
    Element* s = nullptr;
    float* row_sums = nullptr;
    int64_t row_sums_stride = 0;
  };
  using Arguments = Params;

  struct SharedStorage {
    // Of the tile's columns: the bias, then coefficient 0, 1, ...
    alignas(16) float parameters[kMaxDegree + 2][kTileColumns];
  };

  class Callbacks {
   public:
    CUTLASS_DEVICE Callbacks(const Params& params, SharedStorage& shared, cutlass::gemm::GemmCoord tile, int rows_of_tile, int thread)
        : params_(params), shared_(shared), tile_(tile.n()), thread_(thread) {
      const cutlass::MatrixCoord offset = ThreadMap::initial_offset(thread);
      row_ = tile.m() * rows_of_tile + offset.row();
      column_of_tile_ = offset.column();
      column_ = tile.n() * kTileColumns + column_of_tile_;
    }

    CUTLASS_DEVICE void begin_epilogue() {
      // The shared memory was the main loop's until here. The epilogue synchronises again before the first visit.
      __syncthreads();
      const int first = tile_ * kTileColumns;
      for (int i = thread_; i < (params_.degree + 2) * kTileColumns; i += ThreadMap::kThreads) {
        const int which = i / kTileColumns;
        const int column = first + i % kTileColumns;
        float value = 0;
        if (column < params_.columns) {
          if (which > 0) {
            const int64_t k = which - 1;
            value = params_.per_channel ? params_.coefficients[k * params_.columns + column] : params_.coefficients[k];
          } else if (params_.bias) {
            value = params_.bias[column];
          }
        }
        shared_.parameters[which][i % kTileColumns] = value;
      }
    }

    // Fetches the tap sums of the step's positions, which are on their way while the accumulators change threads.
    CUTLASS_DEVICE void begin_step(int step) {
      step_ = step;
      if (!params_.row_sums) return;
      CUTLASS_PRAGMA_UNROLL
      for (int row_index = 0; row_index < Walk::kRowsPerStep; ++row_index) {
        const int row = row_ + Walk::row(step, row_index);
        int sample, position;
        params_.positions(sample, position, row);
        CUTLASS_PRAGMA_UNROLL
        for (int access = 0; access < Walk::kColumnAccesses; ++access) {
          const int column = column_ + Walk::column(access);
          Floats& taps = taps_[row_index * Walk::kColumnAccesses + access];
          taps.fill(params_.tap_sq ? 0.f : 1.f);
          if (params_.tap_sq && row < params_.rows && column < params_.columns) {
            fetch(params_.tap_sq + int64_t{position} * params_.tap_sq_stride + column, taps);
          }
        }
      }
    }

    CUTLASS_DEVICE void begin_row(int) { row_sum_ = 0; }

    CUTLASS_DEVICE void visit(int step, int row_index, int access, int fragment, const Floats& accumulators) {
      const int row = row_ + Walk::row(step, row_index);
      const int column = column_ + Walk::column(access);
      const int column_of_tile = column_of_tile_ + Walk::column(access);
      const bool inside = row < params_.rows && column < params_.columns;
      const int64_t place = int64_t{row} * params_.columns + column;

      Floats z = parameters(0, column_of_tile);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kVector; ++i) z[i] += accumulators[i];
      if (params_.s) store(params_.s + place, z, inside);

      const int degree = params_.degree;
      Floats slope = parameters(degree + 1, column_of_tile);
      Floats value = parameters(degree, column_of_tile);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kVector; ++i) value[i] = slope[i] * z[i] + value[i];
      // A loop for every degree at once: unrolled, the coefficients of the higher ones would not fit beside the accumulators.
#pragma unroll 1
      for (int k = degree - 2; k >= 0; --k) {
        const Floats coefficient = parameters(k + 1, column_of_tile);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kVector; ++i) scalar_target::horner_step(z[i], coefficient[i], value[i], slope[i]);
      }
      store(params_.y + place, value, inside);

      // Beyond the last column there is nothing to add; beyond the last row the sum is not stored.
      if (params_.row_sums && column < params_.columns) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kVector; ++i) row_sum_ += slope[i] * slope[i] * taps_[fragment][i];
      }
    }

    CUTLASS_DEVICE void end_row(int row_index) {
      if (!params_.row_sums) return;
      CUTLASS_PRAGMA_UNROLL
      for (int distance = Walk::kLanesPerRow / 2; distance > 0; distance /= 2) {
        row_sum_ += __shfl_xor_sync(0xFFFFFFFFu, row_sum_, distance);
      }
      const int row = row_ + Walk::row(step_, row_index);
      if (thread_ % Walk::kLanesPerRow == 0 && row < params_.rows) {
        params_.row_sums[tile_ * params_.row_sums_stride + row] = row_sum_;
      }
    }

    CUTLASS_DEVICE void end_step(int) {}
    CUTLASS_DEVICE void end_epilogue() {}

   private:
    using AlignedFloats = cutlass::AlignedArray<float, kVector, (kVector >= 4 ? 16 : 4)>;

    CUTLASS_DEVICE Floats parameters(int which, int column_of_tile) const {
      return *reinterpret_cast<const AlignedFloats*>(&shared_.parameters[which][column_of_tile]);
    }

    CUTLASS_DEVICE static void fetch(const float* place, Floats& values) {
      if constexpr (kVector % 4 == 0) {
        // As an array the compiler would load them one by one.
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kVector; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(place + i);
          values[i] = four.x;
          values[i + 1] = four.y;
          values[i + 2] = four.z;
          values[i + 3] = four.w;
        }
      } else {
        static_assert(kVector == 1, "a vector is 16 bytes or one element");
        values[0] = *place;
      }
    }

    CUTLASS_DEVICE static void store(Element* place, const Floats& values, bool inside) {
      using AlignedElements = cutlass::AlignedArray<Element, kVector>;
      const auto converted = cutlass::NumericArrayConverter<Element, float, kVector>{}(values);
      if (inside) *reinterpret_cast<AlignedElements*>(place) = reinterpret_cast<const AlignedElements&>(converted);
    }

    const Params& params_;
    SharedStorage& shared_;
    int tile_, thread_, row_, column_, column_of_tile_;
    int step_ = 0;
    float row_sum_ = 0;
    Floats taps_[Walk::kRowsPerStep * Walk::kColumnAccesses];
  };

  CUTLASS_DEVICE PolynomialEpilogue(const Params& params, SharedStorage& shared) : params_(params), shared_(shared) {}

  // `rows_of_tile` stands in the place of CUTLASS's problem shape, which the parameters hold.
  CUTLASS_DEVICE Callbacks get_callbacks(cutlass::gemm::GemmCoord tile, int thread, int rows_of_tile) {
    return Callbacks(params_, shared_, tile, rows_of_tile, thread);
  }

 private:
  const Params& params_;
  SharedStorage& shared_;
};

}  // namespace chainzrule
