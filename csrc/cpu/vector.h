// Vectors of float and double as wide as the instruction set has them, and the elementary functions on them.
//
// These are the vector types of GCC and Clang: arithmetic, comparison and `condition ? a : b` work element by element, on any
// machine. CHAINZRULE_VECTOR_BYTES is 64 for AVX-512, 32 for AVX2, 16 elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/elementary.h"
#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

using VectorFloat = float __attribute__((vector_size(CHAINZRULE_VECTOR_BYTES)));
using VectorDouble = double __attribute__((vector_size(CHAINZRULE_VECTOR_BYTES)));
using VectorInt = int32_t __attribute__((vector_size(CHAINZRULE_VECTOR_BYTES)));
using VectorLong = int64_t __attribute__((vector_size(CHAINZRULE_VECTOR_BYTES)));

template <>
struct ElementOf<VectorFloat> {
  using type = float;
};
template <>
struct ElementOf<VectorDouble> {
  using type = double;
};

template <>
struct ElementOf<VectorInt> {
  using type = int32_t;
};
template <>
struct ElementOf<VectorLong> {
  using type = int64_t;
};

template <class E>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VectorFloat;
  using Index = VectorInt;
};
template <>
struct VectorOf<double> {
  using type = VectorDouble;
  using Index = VectorLong;
};
template <class E>
using Vector = typename VectorOf<E>::type;

template <class E>
constexpr int64_t kLanes = CHAINZRULE_VECTOR_BYTES / static_cast<int64_t>(sizeof(E));

template <class E>
CHAINZRULE_INLINE Vector<E> broadcast(E x) {
  return x - Vector<E>{};  // x - 0 keeps the sign of a zero
}

// How many elements of a vector are there: all of them, or the first few at the end of a row.
struct Whole {};
struct Part {
  int64_t count;
};

template <class E>
CHAINZRULE_INLINE Vector<E> load(const E* from, Whole) {
  Vector<E> result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
template <class E>
CHAINZRULE_INLINE Vector<E> load(const E* from, Part part) {
  Vector<E> result{};
  std::memcpy(&result, from, static_cast<size_t>(part.count) * sizeof(E));
  return result;
}

template <class E>
CHAINZRULE_INLINE void store(E* to, Vector<E> x, Whole) {
  std::memcpy(to, &x, sizeof(x));
}
template <class E>
CHAINZRULE_INLINE void store(E* to, Vector<E> x, Part part) {
  std::memcpy(to, &x, static_cast<size_t>(part.count) * sizeof(E));
}

// The vector with zeros in the elements that are not there, whatever stands in them.
template <class V>
CHAINZRULE_INLINE V keep(V x, Whole) {
  return x;
}
template <class E>
CHAINZRULE_INLINE typename VectorOf<E>::Index lane_numbers() {
  using Index = typename VectorOf<E>::Index;
  Index lanes{};
  for (int64_t lane = 0; lane < kLanes<E>; ++lane) lanes[lane] = static_cast<Element<Index>>(lane);
  return lanes;
}
template <class V>
CHAINZRULE_INLINE V keep(V x, Part part) {
  using Index = typename VectorOf<Element<V>>::Index;
  return lane_numbers<Element<V>>() < static_cast<Element<Index>>(part.count) ? x : V{};
}
// The vector with zeros below the first lane.
template <class V>
CHAINZRULE_INLINE V keep_from(V x, int64_t first) {
  using Index = typename VectorOf<Element<V>>::Index;
  return lane_numbers<Element<V>>() >= static_cast<Element<Index>>(first) ? x : V{};
}

// The sum of the elements, pairwise.
template <class E>
CHAINZRULE_INLINE double sum_of_lanes(Vector<E> x) {
  E lanes[kLanes<E>];
  std::memcpy(lanes, &x, sizeof(x));
  for (int64_t half = kLanes<E> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return static_cast<double>(lanes[0]);
}

// Calls body(offset, Whole) for each whole vector of the n elements from `begin`, and body(offset, Part) for what is left.
template <class E, class Body>
CHAINZRULE_INLINE void for_each_vector(int64_t begin, int64_t n, const Body& body) {
  const int64_t end = begin + n;
  int64_t j = begin;
  for (; j + kLanes<E> <= end; j += kLanes<E>) body(j, Whole{});
  if (j < end) body(j, Part{end - j});
}

// Calls body(begin, count) for each block of 16 vectors of n elements: what one sum of each lane may run over.
template <class E, class Body>
CHAINZRULE_INLINE void for_each_block(int64_t n, const Body& body) {
  constexpr int64_t kBlock = 16 * kLanes<E>;
  for (int64_t begin = 0; begin < n; begin += kBlock) body(begin, n - begin < kBlock ? n - begin : kBlock);
}

// ---- elementary functions of float vectors, within about one unit in the last place --------------------------------

CHAINZRULE_INLINE VectorFloat as_float(VectorInt x) { return reinterpret_cast<VectorFloat>(x); }
CHAINZRULE_INLINE VectorInt as_int(VectorFloat x) { return reinterpret_cast<VectorInt>(x); }

CHAINZRULE_INLINE VectorFloat absolute(VectorFloat x) { return as_float(as_int(x) & 0x7FFFFFFF); }

CHAINZRULE_INLINE VectorFloat with_sign_of(VectorFloat magnitude, VectorFloat sign) {
  return as_float((as_int(magnitude) & 0x7FFFFFFF) | (as_int(sign) & static_cast<int32_t>(0x80000000)));
}

// 2^n for an integer n from -190 to 63, in two factors: `scale` and, so that subnormal results are rounded once, kRescale.
// Adding kRounding to a number rounds it to an integer n and leaves the bits of n + 64 where an exponent needs them.
constexpr float kRounding = 12582912.0f + 191.0f;  // 1.5 * 2^23 + 127 + 64
constexpr float kRescale = 0x1.0p-64f;
CHAINZRULE_INLINE VectorFloat scale(VectorFloat rounded) { return as_float(as_int(rounded) << 23); }

// For x <= 43, which is all that the activations ask of it.
CHAINZRULE_INLINE VectorFloat exponential(VectorFloat x) {
  // Below this the result is 0; NaN compares false and stays.
  x = x < -104.0f ? broadcast(-104.0f) : x;
  // x = n log 2 + r, |r| <= log(2)/2.
  const VectorFloat rounded = x * 1.44269504088896341f + kRounding;
  const VectorFloat n = rounded - kRounding;
  VectorFloat r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VectorFloat p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * scale(rounded) * kRescale;
}

// Density and probability of the normal distribution from one exponential e = exp(-x^2 / 2): the density is a multiple of e,
// and the probability of the tail beyond |x| is e P(|x|) / Q(|x|). csrc/math/fit_normal.py found the coefficients.
CHAINZRULE_INLINE NormalDistribution<VectorFloat> normal_distribution(VectorFloat x) {
  // Beyond 16 both are 0 or 1; NaN compares false and stays.
  VectorFloat a = absolute(x);
  a = a > 16.0f ? broadcast(16.0f) : a;
  const VectorFloat a_sq = a * a;
  // e = 2^(n + r), |r| <= 1/2.
  const float minus_half_log2_e = -0.72134752044448170f;
  const VectorFloat rounded = a_sq * minus_half_log2_e + kRounding;
  const VectorFloat r = a_sq * minus_half_log2_e - (rounded - kRounding);
  VectorFloat power = 1.53293106e-4f * r + 1.33909704e-3f;
  power = power * r + 9.61849932e-3f;
  power = power * r + 5.55035956e-2f;
  power = power * r + 2.40226477e-1f;
  power = power * r + 6.93147182e-1f;
  power = power * r + 1.0f;
  const VectorFloat e = power * scale(rounded) * kRescale;
  VectorFloat p = 4.1901716e-3f * a + 4.11449485e-2f;
  p = p * a + 1.84772849e-1f;
  p = p * a + 4.40400332e-1f;
  p = p * a + 0.5f;
  VectorFloat q = 1.05031021e-2f * a + 1.03140756e-1f;
  q = q * a + 4.73523557e-1f;
  q = q * a + 1.20893848f;
  q = q * a + 1.67868555f;
  q = q * a + 1.0f;
  const VectorFloat tail = e * p / q;
  return {0.39894228040143267794f * e, x < 0.0f ? tail : 1.0f - tail};
}

CHAINZRULE_INLINE VectorFloat hyperbolic_tangent(VectorFloat x, VectorFloat decay, VectorFloat reciprocal) {
  const VectorFloat s = x * x;
  VectorFloat near = -5.70498872745e-3f * s + 2.06390887954e-2f;
  near = near * s - 5.37397155531e-2f;
  near = near * s + 1.33314422036e-1f;
  near = near * s - 3.33332819422e-1f;
  near = near * (s * x) + x;
  const VectorFloat far = 1.0f - (2.0f * decay) * reciprocal;
  return with_sign_of(absolute(x) < 0.625f ? near : far, x);
}

// For 0 <= x <= 1, which is all that softplus asks of it; `reciprocal` is 1 / (1 + x).
CHAINZRULE_INLINE VectorFloat logarithm_of_one_plus(VectorFloat x, VectorFloat reciprocal) {
  const VectorFloat sum = 1.0f + x;
  const VectorFloat lost = x - (sum - 1.0f);
  const VectorInt large = sum > 1.41421356f;
  const VectorFloat m = (large ? 0.5f * sum : sum) - 1.0f;
  const VectorFloat m_sq = m * m;
  VectorFloat p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * m_sq - 0.5f * m_sq;
  const VectorFloat high = large ? broadcast(0.693359375f) : VectorFloat{};
  const VectorFloat low = large ? broadcast(-2.12194440e-4f) : VectorFloat{};
  return high + (m + (p + (low + lost * reciprocal)));
}

// ---- elementary functions of double vectors: the C library's, element by element (float64 is for checking) -----------

CHAINZRULE_INLINE VectorDouble exponential(VectorDouble x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = exponential(x[lane]);
  return x;
}
CHAINZRULE_INLINE NormalDistribution<VectorDouble> normal_distribution(VectorDouble x) {
  NormalDistribution<VectorDouble> result;
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    const NormalDistribution<double> of_lane = normal_distribution(x[lane]);
    result.density[lane] = of_lane.density;
    result.probability[lane] = of_lane.probability;
  }
  return result;
}
CHAINZRULE_INLINE VectorDouble logarithm_of_one_plus(VectorDouble x, VectorDouble reciprocal) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = logarithm_of_one_plus(x[lane], reciprocal[lane]);
  return x;
}
CHAINZRULE_INLINE VectorDouble hyperbolic_tangent(VectorDouble x, VectorDouble decay, VectorDouble reciprocal) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = hyperbolic_tangent(x[lane], decay[lane], reciprocal[lane]);
  return x;
}

}  // namespace chainzrule::CHAINZRULE_TARGET
