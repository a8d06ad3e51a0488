// The elementary functions that the activations are made of, for scalars. cpu/vector.h overloads them for vectors.
#pragma once

#include <cmath>

#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

CHAINZRULE_INLINE float exponential(float x) { return ::expf(x); }
CHAINZRULE_INLINE double exponential(double x) { return ::exp(x); }

CHAINZRULE_INLINE float error_function(float x) { return ::erff(x); }
CHAINZRULE_INLINE double error_function(double x) { return ::erf(x); }

CHAINZRULE_INLINE float logarithm_of_one_plus(float x) { return ::log1pf(x); }
CHAINZRULE_INLINE double logarithm_of_one_plus(double x) { return ::log1p(x); }

// tanh(x). `decay` is exp(-2 |x|), which the callers have at hand; a vector version builds on it.
CHAINZRULE_INLINE float hyperbolic_tangent(float x, float /*decay*/) { return ::tanhf(x); }
CHAINZRULE_INLINE double hyperbolic_tangent(double x, double /*decay*/) { return ::tanh(x); }

template <class Real>
CHAINZRULE_INLINE Real absolute(Real x) {
  return x < Element<Real>(0) ? -x : x;
}

}  // namespace chainzrule::CHAINZRULE_TARGET
