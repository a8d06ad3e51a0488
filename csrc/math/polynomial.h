// Polynomials p(z) = c0 + c1 z + ... + cD z^D of fixed degree, evaluated by Horner's rule.
#pragma once

#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

template <class Real, int Degree>
struct Polynomial {
  static constexpr int kCoefficients = Degree + 1;
  Real coefficients[kCoefficients];

  CHAINZRULE_INLINE Jet<Real> jet(Real z) const {
    // Horner's rule for p, and the same recurrence differentiated: p' and p''/2 ride along.
    Real value = coefficients[Degree];
    Real slope = Real{};
    Real half_curvature = Real{};
    for (int k = Degree - 1; k >= 0; --k) {
      half_curvature = half_curvature * z + slope;
      slope = slope * z + value;
      value = value * z + coefficients[k];
    }
    return {value, slope, half_curvature + half_curvature};
  }
};

// Adds to sums[k] what one element contributes to the gradient of coefficient k: g_y z^k + h k z^(k-1), where g_y is the
// gradient that arrives at p and h the gradient that arrives at p'. Either may be absent.
template <int Degree, bool kValueGradient, bool kSlopeGradient, class Real>
CHAINZRULE_INLINE void add_coefficient_gradients(Real z, Real g_y, Real h, Real* sums) {
  Real power = Real{} + Element<Real>(1);  // z^(k-1)
  if constexpr (kValueGradient) sums[0] += g_y;
  const Real g_y_z = kValueGradient ? g_y * z : Real{};
  for (int k = 1; k <= Degree; ++k) {
    Real term = g_y_z;
    if constexpr (kSlopeGradient) term = kValueGradient ? term + Element<Real>(k) * h : Element<Real>(k) * h;
    if (k == 1) {
      sums[k] += term;
    } else {
      power = k == 2 ? z : power * z;
      sums[k] += term * power;
    }
  }
}

}  // namespace chainzrule::CHAINZRULE_TARGET
