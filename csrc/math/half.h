// bfloat16 and float16 to and from float, rounded to nearest even, without branches, so that loops over them vectorise.
#pragma once

#include <cstdint>

#include "math/target.h"

namespace chainzrule::CHAINZRULE_TARGET {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

CHAINZRULE_INLINE float widened(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

CHAINZRULE_INLINE float widened(Float16 x) {
  const uint32_t shifted = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = shifted & 0x80000000u;
  const uint32_t magnitude = shifted << 1;
  // Normal numbers, Inf and NaN: move exponent and mantissa into place and correct the exponent by a product.
  const float normal = __builtin_bit_cast(float, (magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  // Subnormal numbers: the mantissa as the last bits of 0.5, less 0.5.
  const float subnormal = __builtin_bit_cast(float, (magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t bits =
      magnitude < (1u << 27) ? __builtin_bit_cast(uint32_t, subnormal) : __builtin_bit_cast(uint32_t, normal);
  return __builtin_bit_cast(float, sign | bits);
}

CHAINZRULE_INLINE void narrow(float x, BFloat16& result) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

CHAINZRULE_INLINE void narrow(float x, Float16& result) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t doubled = bits + bits;  // the sign is shifted out
  const float magnitude = __builtin_bit_cast(float, bits & 0x7FFFFFFFu);
  // Overflow becomes Inf in the first product; the second restores the scale, short by the 2^2 that the sum below needs.
  const float scaled = (magnitude * 0x1.0p+112f) * 0x1.0p-110f;
  // Adding a power of two aligned with the last place of a float16 makes the sum round there.
  const uint32_t exponent = doubled & 0xFF000000u;
  const uint32_t aligned = (exponent < 0x71000000u ? 0x71000000u : exponent) >> 1;
  const float rounded = __builtin_bit_cast(float, aligned + 0x07800000u) + scaled;
  const uint32_t rounded_bits = __builtin_bit_cast(uint32_t, rounded);
  const uint32_t nonsign = ((rounded_bits >> 13) & 0x7C00u) + (rounded_bits & 0x0FFFu);
  result.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (doubled > 0xFF000000u ? 0x7E00u : nonsign));
}

}  // namespace chainzrule::CHAINZRULE_TARGET
