// The number formats of the PTX ISA in portable C++: f16 (IEEE 754 binary16) and bf16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
inline To bitsAs(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

inline double halfToDouble(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? std::nan("") : INFINITY;
  } else if (exponent) {
    magnitude = std::ldexp(1024.0 + mantissa, exponent - 25);
  } else {
    magnitude = std::ldexp(double(mantissa), -24);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Rounds to nearest even: once, if the double is exact or was rounded to odd.
inline uint16_t doubleToHalf(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;  // the canonical NaN of the PTX ISA
  if (magnitude >= 65520.0) return sign | 0x7c00;
  if (magnitude < 6.103515625e-05) {  // subnormal: multiples of 2^-24
    return sign | uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  int exponent;
  const double fraction = std::frexp(magnitude, &exponent);                  // in [0.5, 1)
  const auto mantissa = uint32_t(std::nearbyint(std::ldexp(fraction, 11)));  // in [1024, 2048]
  return sign | uint16_t(((exponent + 14) << 10) + (mantissa - 1024));
}

inline float bfloatToFloat(uint16_t bits) { return bitsAs<float>(uint32_t(bits) << 16); }

// Rounds a double to bf16 once, to nearest even.
inline uint16_t doubleToBfloat(double value) {
  if (std::isnan(value)) return 0x7fff;
  float nearest = float(value);
  uint32_t bits = bitsAs<uint32_t>(nearest);
  if (std::isinf(nearest)) return uint16_t(bits >> 16);
  // Round to odd first, so that the second rounding cannot see a tie that was none.
  if (double(nearest) != value) {
    if (std::fabs(double(nearest)) > std::fabs(value)) bits -= 1;
    bits |= 1;
  }
  bits += 0x7fff + (bits >> 16 & 1);
  return uint16_t(bits >> 16);
}

}  // namespace ptx
