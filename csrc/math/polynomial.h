// Polynomials p(z) = c0 + c1 z + ... + cD z^D of fixed degree, evaluated by Horner's rule.
#pragma once

#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

// One step of Horner's rule for p, and the same step differentiated for p'. The first coefficients begin without a step, as
// value = c_D z + c_(D-1) and slope = c_D, because 0 * Inf is not 0.
template <class Real, class Coefficient>
CHAINZRULE_INLINE void horner_step(Real z, Coefficient coefficient, Real& value, Real& slope) {
  slope = slope * z + value;
  value = value * z + coefficient;
}

template <class Real, int Degree>
struct Polynomial {
  static constexpr int kCoefficients = Degree + 1;
  Real coefficients[kCoefficients];

  // p', as a polynomial of its own.
  CHAINZRULE_INLINE Polynomial<Real, Degree - 1> derivative() const {
    Polynomial<Real, Degree - 1> result;
    unrolled<Degree>([&](auto k) { result.coefficients[k] = Element<Real>(k + 1) * coefficients[k + 1]; });
    return result;
  }

  CHAINZRULE_INLINE Jet<Real> jet(Real z) const {
    // p''/2 rides along by the recurrence differentiated once more.
    Real value = coefficients[Degree] * z + coefficients[Degree - 1];
    Real slope = coefficients[Degree];
    Real half_curvature = Real{};
    unrolled<Degree - 1>([&](auto step) {
      constexpr int k = Degree - 2 - decltype(step)::value;
      half_curvature = k == Degree - 2 ? slope : half_curvature * z + slope;
      horner_step(z, coefficients[k], value, slope);
    });
    return {value, slope, half_curvature + half_curvature};
  }
};

template <class Real>
struct Polynomial<Real, 0> {
  Real coefficients[1];

  CHAINZRULE_INLINE Jet<Real> jet(Real) const { return {coefficients[0], Real{}, Real{}}; }
};

// p(relu(z)) is p at `rectified(z)`, with the derivatives that are left of p's: as in PyTorch 0 at 0, and NaN passes through.
template <class Real>
CHAINZRULE_INLINE Real rectified(Real z) {
  return z < Element<Real>(0) ? Real{} : z;
}
template <class Real>
CHAINZRULE_INLINE Real where_rising(Real z, Real derivative) {
  return z <= Element<Real>(0) ? Real{} : derivative;
}
template <class Real>
CHAINZRULE_INLINE Jet<Real> where_rising(Real z, Jet<Real> jet) {
  return {jet.value, where_rising(z, jet.slope), where_rising(z, jet.curvature)};
}

// Adds to sums[k] what one element contributes to the gradient of coefficient k: g_y z^k + h k z^(k-1), where g_y is the
// gradient that arrives at p and h the gradient that arrives at p'. Either may be absent.
template <int Degree, bool kValueGradient, bool kSlopeGradient, class Real>
CHAINZRULE_INLINE void add_coefficient_gradients(Real z, Real g_y, Real h, Real* sums) {
  if constexpr (kValueGradient) sums[0] += g_y;
  const Real g_y_z = kValueGradient ? g_y * z : Real{};
  Real power = z;  // z^(k-1), from k = 2 on
  unrolled<Degree>([&](auto step) {
    constexpr int k = decltype(step)::value + 1;
    Real term = g_y_z;
    if constexpr (kSlopeGradient) term = kValueGradient ? term + Element<Real>(k) * h : Element<Real>(k) * h;
    if constexpr (k > 2) power = power * z;
    if constexpr (k == 1) {
      sums[k] += term;
    } else {
      sums[k] += term * power;
    }
  });
}

}  // namespace chainzrule::CHAINZRULE_TARGET
