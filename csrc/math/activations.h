// The fixed activations: value, slope and curvature of each, one struct each.
//
// Real is float, double or a vector of them, so `condition ? a : b` selects element by element. The formulas avoid the
// differences of nearly equal numbers (1 - tanh^2 and s (1 - s) far out) of the textbook ones. The Python twin of this file,
// with third derivatives, is chainzrule_kernels/functions/activations.py.
#pragma once

#include "math/elementary.h"
#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

struct Relu {
  static constexpr const char* kName = "relu";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    // As in PyTorch: slope 0 at 0, and NaN passes through.
    const Real zero = Real{};
    const Real one = zero + E(1);
    return {z < E(0) ? zero : z, z <= E(0) ? zero : one, zero};
  }
};

// z where a derivative still moves. Farther out it has reached its limit, and 0 * Inf would make it NaN.
template <class Real>
CHAINZRULE_INLINE Real bounded(Real z) {
  using E = Element<Real>;
  const Real limit = Real{} + E(1e3);
  return z > E(1e3) ? limit : (z < E(-1e3) ? -limit : z);
}

struct Gelu {
  static constexpr const char* kName = "gelu";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const Real x = bounded(z);
    const Real x_sq = x * x;
    const NormalDistribution<Real> normal = normal_distribution(x);
    return {z * normal.probability, normal.probability + x * normal.density, normal.density * (E(2) - x_sq)};
  }
};

// The logistic function with its first two derivatives; t = exp(-|z|), which never overflows, and r = 1 / (1 + t).
template <class Real>
CHAINZRULE_INLINE Jet<Real> logistic(Real z, Real t, Real r) {
  using E = Element<Real>;
  const Real smaller = t * r;  // of s and 1 - s, so that the difference below loses nothing
  const Real slope = smaller - smaller * smaller;
  const Real twist = E(2) * smaller - E(1);  // 1 - 2 s for z >= 0
  return {z < E(0) ? smaller : r, slope, slope * (z < E(0) ? -twist : twist)};
}

template <class Real>
CHAINZRULE_INLINE Jet<Real> logistic(Real z) {
  using E = Element<Real>;
  const Real t = exponential(-absolute(z));
  return logistic(z, t, E(1) / (E(1) + t));
}

// tanh with its first two derivatives; `decay` is exp(-2 |z|), and r = 1 / (1 + decay).
template <class Real>
CHAINZRULE_INLINE Jet<Real> tangent_hyperbolic(Real z, Real decay, Real r) {
  using E = Element<Real>;
  const Real value = hyperbolic_tangent(z, decay, r);
  // Near 0 the difference loses nothing, and far out the product does not.
  const Real slope = absolute(z) < E(0.6) ? E(1) - value * value : E(4) * decay * r * r;
  return {value, slope, E(-2) * value * slope};
}

struct GeluTanh {
  static constexpr const char* kName = "gelu_tanh";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const E scale = E(0.79788456080286535588);  // sqrt(2 / pi)
    const E cubic = E(0.044715);
    const Real x = bounded(z);
    const Real x_sq = x * x;
    const Real u = scale * (x + cubic * x_sq * x);
    const Real decay = exponential(E(-2) * absolute(u));
    const Real r = E(1) / (E(1) + decay);
    const Jet<Real> t = tangent_hyperbolic(u, decay, r);
    const Real inner_1 = scale * (E(1) + E(3) * cubic * x_sq);
    const Real inner_2 = E(6) * scale * cubic * x;
    const Real t_1 = t.slope * inner_1;
    const Real t_2 = t.slope * inner_2 + t.curvature * inner_1 * inner_1;
    const Real half_x = E(0.5) * x;
    // (1 + tanh(u)) / 2, which is the logistic function of 2 u.
    const Real gate = u < E(0) ? decay * r : r;
    return {z * gate, gate + half_x * t_1, t_1 + half_x * t_2};
  }
};

struct Silu {
  static constexpr const char* kName = "silu";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const Real x = bounded(z);
    const Jet<Real> s = logistic(x);
    return {z * s.value, s.value + x * s.slope, E(2) * s.slope + x * s.curvature};
  }
};

struct Tanh {
  static constexpr const char* kName = "tanh";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const Real decay = exponential(E(-2) * absolute(z));
    return tangent_hyperbolic(z, decay, E(1) / (E(1) + decay));
  }
};

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    return logistic(z);
  }
};

struct Softplus {
  static constexpr const char* kName = "softplus";

  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const Real t = exponential(-absolute(z));
    const Real r = E(1) / (E(1) + t);
    const Jet<Real> s = logistic(z, t, r);
    const Real positive_part = z < E(0) ? Real{} : z;
    return {positive_part + logarithm_of_one_plus(t, r), s.value, s.slope};
  }
};

struct Mish {
  static constexpr const char* kName = "mish";

  // z w with w = tanh(softplus(z)) = n / (n + 2), n = e (e + 2), e = exp(z), and with r = 1 / (n + 2)
  //   w' = 4 e r (1 + e) r and w'' = 4 e r (1 - 2 e w) r.
  // Beyond `saturation` w is 1 to the last bit, and its derivatives are taken for 0; up to it no product overflows.
  template <class Real>
  static CHAINZRULE_INLINE Jet<Real> jet(Real z) {
    using E = Element<Real>;
    const E saturation = E(29);
    const Real ceiling = Real{} + saturation;
    const Real capped = z > saturation ? ceiling : z;
    const Real floor = Real{} - E(1e3);  // as in `bounded`
    const Real x = capped < E(-1e3) ? floor : capped;
    const Real e = exponential(capped);
    const Real n = e * (e + E(2));
    const Real r = E(1) / (n + E(2));
    const Real w = z < E(0) ? n * r : E(1) - E(2) * r;
    const Real factor = z > saturation ? Real{} : E(4) * (e * r);
    const Real one_plus_e = E(1) + e;
    const Real w_1 = factor * (one_plus_e * r);
    return {z * w, w + x * w_1, factor * (r * (E(2) * one_plus_e + x * (E(1) - E(2) * e * w)))};
  }
};

// Whether an activation has a curvature. One without lets the gradient of its norm go nowhere, and what arrives where it is flat
// is not even multiplied by the slope: an infinite gradient, too, is stopped there, as in PyTorch.
template <class Activation>
constexpr bool kCurved = true;
template <>
inline constexpr bool kCurved<Relu> = false;

// Calls `visit` with an object of every activation, in one fixed order.
template <class Visitor>
void for_each_activation(Visitor&& visit) {
  visit(Relu{});
  visit(Gelu{});
  visit(GeluTanh{});
  visit(Silu{});
  visit(Tanh{});
  visit(Sigmoid{});
  visit(Softplus{});
  visit(Mish{});
}

}  // namespace chainzrule::CHAINZRULE_TARGET
