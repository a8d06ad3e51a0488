// The elementary functions that the activations are made of, for scalars. cpu/vector.h overloads them for vectors.
#pragma once

#include <cmath>

#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

CHAINZRULE_INLINE float exponential(float x) { return ::expf(x); }
CHAINZRULE_INLINE double exponential(double x) { return ::exp(x); }

// log(1 + x) and tanh(x). `reciprocal` is 1 / (1 + x), or 1 / (1 + decay) with decay = exp(-2 |x|): the callers have them at
// hand, and a vector version builds on them.
CHAINZRULE_INLINE float logarithm_of_one_plus(float x, float /*reciprocal*/) { return ::log1pf(x); }
CHAINZRULE_INLINE double logarithm_of_one_plus(double x, double /*reciprocal*/) { return ::log1p(x); }
CHAINZRULE_INLINE float hyperbolic_tangent(float x, float /*decay*/, float /*reciprocal*/) { return ::tanhf(x); }
CHAINZRULE_INLINE double hyperbolic_tangent(double x, double /*decay*/, double /*reciprocal*/) { return ::tanh(x); }

// The normal distribution's density at x, and its probability below x.
template <class Real>
struct NormalDistribution {
  Real density;
  Real probability;
};
CHAINZRULE_INLINE NormalDistribution<float> normal_distribution(float x) {
  return {0.39894228040143267794f * ::expf(-0.5f * x * x), 0.5f + 0.5f * ::erff(0.70710678118654752440f * x)};
}
CHAINZRULE_INLINE NormalDistribution<double> normal_distribution(double x) {
  return {0.39894228040143267794 * ::exp(-0.5 * x * x), 0.5 + 0.5 * ::erf(0.70710678118654752440 * x)};
}

template <class Real>
CHAINZRULE_INLINE Real absolute(Real x) {
  return x < Element<Real>(0) ? -x : x;
}

}  // namespace chainzrule::CHAINZRULE_TARGET
