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
// One dimension after the other; both arrays are used up.
class Spreading {
 public:
  explicit Spreading(const SquaredTaps& a) : a_(a) {
    int64_t room = 1;
    int64_t inner = 1;
    for (int d = a.dimensions; d-- > 0;) {
      inner *= a.dimension[d].windows;
      int64_t size = inner;
      for (int e = 0; e < d; ++e) size *= a.dimension[e].taps;
      room = std::max(room, size);
    }
    room = std::max(room, a.taps);
    from_ = AlignedBuffer<double>(room);
    to_ = AlignedBuffer<double>(room);
  }

  // Of the taps, before spread(); of the windows, before gather(); and the results.
  double* data() { return from_.get(); }

  void spread() {
    int64_t inner = 1;
    for (int d = a_.dimensions; d-- > 0;) {
      const SquaredTaps::Dimension& along = a_.dimension[d];
      const int64_t outer = outer_taps(d);
      std::fill_n(to_.get(), outer * along.windows * inner, 0.0);
      for (int64_t o = 0; o < outer; ++o) {
        for (int64_t t = 0; t < along.taps; ++t) {
          const double* from = from_.get() + (o * along.taps + t) * inner;
          double* to = to_.get() + o * along.windows * inner;
          if (inner == 1) {
            for (int64_t p = along.begin(t); p < along.end(t); ++p) to[p] += *from;
          } else {
            for (int64_t p = along.begin(t); p < along.end(t); ++p) add(from, inner, to + p * inner);
          }
        }
      }
      std::swap(from_, to_);
      inner *= along.windows;
    }
  }

  void gather() {
    int64_t inner = a_.windows();
    for (int d = 0; d < a_.dimensions; ++d) {
      const SquaredTaps::Dimension& along = a_.dimension[d];
      inner /= along.windows;
      const int64_t outer = outer_taps(d);
      for (int64_t o = 0; o < outer; ++o) {
        for (int64_t t = 0; t < along.taps; ++t) {
          const double* from = from_.get() + o * along.windows * inner;
          double* to = to_.get() + (o * along.taps + t) * inner;
          if (inner == 1) {
            *to = sum(from + along.begin(t), along.end(t) - along.begin(t));
          } else {
            std::fill_n(to, inner, 0.0);
            for (int64_t p = along.begin(t); p < along.end(t); ++p) add(from + p * inner, inner, to);
          }
        }
      }
      std::swap(from_, to_);
    }
  }

 private:
  int64_t outer_taps(int dimension) const {
    int64_t count = 1;
    for (int e = 0; e < dimension; ++e) count *= a_.dimension[e].taps;
    return count;
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

template <class S>
void squared_taps_of(const SquaredTaps& a, int64_t begin, int64_t end) {
  using E = typename ComputeOf<S>::type;
  SquaredRow<S> squares(a.taps);
  Spreading spreading(a);
  const int64_t windows = a.windows();
  for (int64_t k = begin; k < end; ++k) {
    squares.sum(static_cast<const S*>(a.weight) + k * a.columns, a.columns, spreading.data());
    spreading.spread();
    E* result = static_cast<E*>(a.result) + k * windows;
    for (int64_t j = 0; j < windows; ++j) result[j] = static_cast<E>(spreading.data()[j]);
  }
}

// grad_w = 2 w g_t, with g_t the sum of the arriving gradients over the windows in which tap t falls inside the image.
template <class S>
void squared_taps_backward_of(const SquaredTaps& a, int64_t begin, int64_t end) {
  using E = typename ComputeOf<S>::type;
  Spreading spreading(a);
  const int64_t windows = a.windows();
  const int64_t block = taps_block<E>(a.taps);
  AlignedBuffer<E> factors(block);
  Buffer<E> weight_buffer, result_buffer;
  for (int64_t k = begin; k < end; ++k) {
    const E* grad = static_cast<const E*>(a.grad) + k * windows;
    for (int64_t j = 0; j < windows; ++j) spreading.data()[j] = static_cast<double>(grad[j]);
    spreading.gather();
    for (int64_t j = 0; j < block; ++j) factors.get()[j] = static_cast<E>(2 * spreading.data()[j % a.taps]);
    for (int64_t first = 0; first < a.columns; first += block) {
      for (int64_t place = 0; place < block && first + place < a.columns; place += kChunk<E>) {
        const int64_t n = std::min({kChunk<E>, block - place, a.columns - first - place});
        const int64_t column = k * a.columns + first + place;
        const E* weight = read(static_cast<const S*>(a.weight) + column, n, weight_buffer);
        S* result = static_cast<S*>(a.result) + column;
        E* to = target(result, result_buffer);
        const E* factor = factors.get() + place;
        for_each_vector<E>(0, n, [&](int64_t j, auto extent) __attribute__((always_inline)) {
          store(to + j, load(weight + j, extent) * load(factor + j, extent), extent);
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
