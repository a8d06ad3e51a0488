// Words shared by every header of the mathematics.
//
// The CPU kernels compile these headers once for each instruction set. Each copy lives in a namespace of its own
// (CHAINZRULE_TARGET), or the linker would keep one copy of an inline function for all of them, perhaps one that the machine
// at hand cannot execute.
#pragma once

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

// f, f' and f'' at one point. What a caller does not use, the compiler removes.
template <class Real>
struct Jet {
  Real value;
  Real slope;
  Real curvature;
};

}  // namespace chainzrule::CHAINZRULE_TARGET
