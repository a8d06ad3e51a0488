// The squares of a convolution's or linear map's weight, summed over what goes into a unit and, for a padded convolution, for
// each window over the taps that fall inside the image. A part of kernels.inl.
//
// Squares are added in the compute type over kBlocksPerSum blocks, for every place of a block on its own, and then in double.
#pragma once

#include "cpu/arguments.h"
#include "cpu/vector.h"

namespace chainzrule::CHAINZRULE_TARGET {

constexpr int64_t kBlocksPerSum = 16;

// A row of the weight is cut into blocks in which every tap has the same places, whole vectors of them.
template <class E>
int64_t taps_block(int64_t taps) {
  return taps * kLanes<E>;
}

// The sum of the squares of n numbers: for each lane over 16 vectors, then over a chunk, then in double.
template <class S>
double sum_of_squares(const S* from, int64_t n) {
  using E = typename ComputeOf<S>::type;
  Buffer<E> buffer;
  double total = 0;
  for (int64_t first = 0; first < n; first += kChunk<E>) {
    const int64_t count_of_chunk = std::min(kChunk<E>, n - first);
    const E* values = read(from + first, count_of_chunk, buffer);
    Vector<E> squares{};
    for_each_block<E>(count_of_chunk, [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
      Vector<E> recent{};
      for_each_vector<E>(begin, count, [&](int64_t j, auto extent) __attribute__((always_inline)) {
        const Vector<E> value = load(values + j, extent);
        recent += value * value;
      });
      squares += recent;
    });
    total += sum_of_lanes<E>(squares);
  }
  return total;
}

// sums[t] = sum of the squares of tap t over the row's channels.
template <class S>
class SquaredRow {
 public:
  using E = typename ComputeOf<S>::type;

  explicit SquaredRow(int64_t taps)
      : taps_(taps), block_(taps_block<E>(taps)), recent_(block_), total_(block_) {}

  void sum(const S* row, int64_t columns, double* sums) {
    if (taps_ == 1) {
      *sums = sum_of_squares(row, columns);
      return;
    }
    std::fill_n(recent_.get(), block_, E(0));
    std::fill_n(total_.get(), block_, 0.0);
    int64_t blocks = 0;
    for (int64_t begin = 0; begin < columns; begin += block_) {
      add_block(row + begin, std::min(block_, columns - begin));
      if (++blocks % kBlocksPerSum == 0) flush();
    }
    flush();
    std::fill_n(sums, taps_, 0.0);
    for (int64_t place = 0; place < block_; place += taps_) {
      for (int64_t t = 0; t < taps_; ++t) sums[t] += total_.get()[place + t];
    }
  }

 private:
  void add_block(const S* from, int64_t count) {
    for (int64_t first = 0; first < count; first += kChunk<E>) {
      const int64_t n = std::min(kChunk<E>, count - first);
      const E* weight = read(from + first, n, buffer_);
      E* recent = recent_.get() + first;
      for_each_vector<E>(0, n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
        const Vector<E> w = load(weight + j, extent);
        store(recent + j, load(recent + j, extent) + w * w, extent);
      });
    }
  }
  void flush() {
    for (int64_t j = 0; j < block_; ++j) total_.get()[j] += static_cast<double>(recent_.get()[j]);
    std::fill_n(recent_.get(), block_, E(0));
  }

  const int64_t taps_;
  const int64_t block_;
  AlignedBuffer<E> recent_;
  AlignedBuffer<double> total_;
  Buffer<E> buffer_;
};

// From a number for each tap to the sum, for each window, over the taps that fall inside the image; and the transpose of it.
// First in rows, then over them; both arrays are used up.
class Spreading {
 public:
  explicit Spreading(const SquaredTaps& a)
      : a_(a), from_(std::max(a.taps(), a.windows())), to_(a.outer_taps * a.along.windows) {}

  // Of the taps, before spread(); of the windows, before gather(); and the results.
  double* data() { return from_.get(); }

  void spread() {
    const int64_t width = a_.along.windows;
    for (int64_t o = 0; o < a_.outer_taps; ++o) {
      double* to = to_.get() + o * width;
      std::fill_n(to, width, 0.0);
      for (int64_t t = 0; t < a_.along.taps; ++t) {
        const double tap = from_.get()[o * a_.along.taps + t];
        const int64_t end = a_.along.end(t);
#pragma omp simd
        for (int64_t p = a_.along.begin(t); p < end; ++p) to[p] += tap;
      }
    }
    std::fill_n(from_.get(), a_.windows(), 0.0);
    for_each_inside([&](int64_t row, int64_t o) { add(to_.get() + o * width, width, from_.get() + row * width); });
  }

  void gather() {
    const int64_t width = a_.along.windows;
    std::fill_n(to_.get(), a_.outer_taps * width, 0.0);
    for_each_inside([&](int64_t row, int64_t o) { add(from_.get() + row * width, width, to_.get() + o * width); });
    for (int64_t o = 0; o < a_.outer_taps; ++o) {
      for (int64_t t = 0; t < a_.along.taps; ++t) {
        const int64_t begin = a_.along.begin(t);
        from_.get()[o * a_.along.taps + t] = sum(to_.get() + o * width + begin, a_.along.end(t) - begin);
      }
    }
  }

 private:
  template <class Run>
  void for_each_inside(const Run& run) const {
    for (int64_t row = 0; row < a_.rows; ++row) {
      for (int64_t o = 0; o < a_.outer_taps; ++o) {
        if (a_.inside[row * a_.outer_taps + o]) run(row, o);
      }
    }
  }
  static void add(const double* from, int64_t n, double* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
  static double sum(const double* from, int64_t n) {
    double result = 0;
#pragma omp simd reduction(+ : result)
    for (int64_t i = 0; i < n; ++i) result += from[i];
    return result;
  }

  const SquaredTaps& a_;
  AlignedBuffer<double> from_;
  AlignedBuffer<double> to_;
};

// factors[k], where there are any.
template <class E>
double factor_of(const SquaredTaps& a, int64_t k) {
  return a.factors ? static_cast<double>(static_cast<const E*>(a.factors)[k]) : 1.0;
}

template <class S>
void squared_taps_of(const SquaredTaps& a, int64_t begin, int64_t end) {
  using E = typename ComputeOf<S>::type;
  SquaredRow<S> squares(a.taps());
  Spreading spreading(a);
  const int64_t windows = a.windows();
  for (int64_t k = begin; k < end; ++k) {
    squares.sum(static_cast<const S*>(a.weight) + k * a.columns, a.columns, spreading.data());
    spreading.spread();
    const double factor = factor_of<E>(a, k);
    E* result = static_cast<E*>(a.result) + k * windows;
    for (int64_t j = 0; j < windows; ++j) result[j] = static_cast<E>(factor * spreading.data()[j]);
  }
}

// grad_w = 2 w r g_t, with r the factor and g_t the sum of the arriving gradients over the windows in which tap t falls inside the
// image; the factor's gradient is the sum of w^2 g_t.
template <class S>
void squared_taps_backward_of(const SquaredTaps& a, int64_t begin, int64_t end) {
  using E = typename ComputeOf<S>::type;
  SquaredRow<S> squares(a.taps());
  Spreading spreading(a);
  const int64_t taps = a.taps();
  const int64_t windows = a.windows();
  const int64_t block = taps_block<E>(taps);
  AlignedBuffer<E> scales(block);
  AlignedBuffer<double> square_sums(taps);
  Buffer<E> weight_buffer, result_buffer;
  for (int64_t k = begin; k < end; ++k) {
    const S* row = static_cast<const S*>(a.weight) + k * a.columns;
    const E* grad = static_cast<const E*>(a.grad) + k * windows;
    for (int64_t j = 0; j < windows; ++j) spreading.data()[j] = static_cast<double>(grad[j]);
    spreading.gather();
    if (a.factor_gradients) {
      squares.sum(row, a.columns, square_sums.get());
      double sum = 0;
      for (int64_t t = 0; t < taps; ++t) sum += square_sums.get()[t] * spreading.data()[t];
      static_cast<E*>(a.factor_gradients)[k] = static_cast<E>(sum);
    }
    if (!a.result) continue;
    const double factor = factor_of<E>(a, k);
    for (int64_t t = 0; t < taps; ++t) scales.get()[t] = static_cast<E>(2 * factor * spreading.data()[t]);
    for (int64_t j = taps; j < block; ++j) scales.get()[j] = scales.get()[j - taps];
    for (int64_t first = 0; first < a.columns; first += block) {
      for (int64_t place = 0; place < block && first + place < a.columns; place += kChunk<E>) {
        const int64_t n = std::min({kChunk<E>, block - place, a.columns - first - place});
        const int64_t column = first + place;
        const E* weight = read(row + column, n, weight_buffer);
        S* result = static_cast<S*>(a.result) + k * a.columns + column;
        E* to = target(result, result_buffer);
        const E* scale = scales.get() + place;
        for_each_vector<E>(0, n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
          store(to + j, load(weight + j, extent) * load(scale + j, extent), extent);
        });
        finish(result, n, result_buffer);
      }
    }
  }
}

inline void squared_taps(const SquaredTaps& a, int64_t begin, int64_t end) {
  with_storage(a.type, [&](auto* s) { squared_taps_of<std::remove_pointer_t<decltype(s)>>(a, begin, end); });
}
inline void squared_taps_backward(const SquaredTaps& a, int64_t begin, int64_t end) {
  with_storage(a.type, [&](auto* s) { squared_taps_backward_of<std::remove_pointer_t<decltype(s)>>(a, begin, end); });
}

}  // namespace chainzrule::CHAINZRULE_TARGET
