// Words shared by every header of the mathematics.
//
// The CPU kernels compile these headers once for each instruction set. Each copy lives in a namespace of its own
// (CHAINZRULE_TARGET), or the linker would keep one copy of an inline function for all of them, perhaps one that the machine
// at hand cannot execute.
#pragma once

#include <type_traits>
#include <utility>

#ifndef CHAINZRULE_TARGET
#define CHAINZRULE_TARGET scalar_target
#endif

#if defined(__CUDACC__)
#define CHAINZRULE_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define CHAINZRULE_INLINE inline __attribute__((always_inline))
#else
#define CHAINZRULE_INLINE inline
#endif

namespace chainzrule::CHAINZRULE_TARGET {

// A number type of the mathematics is `float`, `double`, or a vector of them; constants are written with its element type.
template <class Real>
struct ElementOf {
  using type = Real;
};

template <class Real>
using Element = typename ElementOf<Real>::type;

// Calls body(std::integral_constant<int, 0>), body(std::integral_constant<int, 1>), ... Compilers unroll a loop too late to
// keep a small array of vectors in registers.
template <class Body, int... Index>
CHAINZRULE_INLINE void unrolled_over(const Body& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}
template <int Count, class Body>
CHAINZRULE_INLINE void unrolled(const Body& body) {
  unrolled_over(body, std::make_integer_sequence<int, Count>{});
}

// f, f' and f'' at one point. What a caller does not use, the compiler removes.
template <class Real>
struct Jet {
  Real value;
  Real slope;
  Real curvature;
};

}  // namespace chainzrule::CHAINZRULE_TARGET
