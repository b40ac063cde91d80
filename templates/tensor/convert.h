// Conversions between any two element types, rounded once.
#pragma once
#include <limits>
#include <type_traits>

#include "types.h"

namespace qg {
namespace {

template <class T>
struct IsNibble : std::false_type {};
template <int kBits, bool kSigned>
struct IsNibble<Nibble<kBits, kSigned>> : std::true_type {};

// A float that any narrower type rounds to what it would make of x: inexact ones are odd in the last place.
inline float odd(float x) { return x; }
inline float odd(double x) {
  const float f = static_cast<float>(x);
  const double back = f;
  if (x != x || back == x) return f;
  uint32_t bits = bit_cast<uint32_t>(f);
  if ((back < 0 ? -back : back) > (x < 0 ? -x : x)) --bits;
  return bit_cast<float>(bits | 1u | (x < 0 ? 0x80000000u : 0u));
}
inline float odd(uint64_t x) {
  if (x >> 24 == 0) return static_cast<float>(x);
  const int shift = 40 - __builtin_clzll(x);
  const bool exact = (x & ((uint64_t{1} << shift) - 1)) == 0;
  const float high = static_cast<float>(x >> shift | (exact ? 0u : 1u));
  return high * static_cast<float>(uint64_t{1} << shift);
}
inline float odd(int64_t x) {
  return x < 0 ? -odd(uint64_t{0} - static_cast<uint64_t>(x)) : odd(static_cast<uint64_t>(x));
}

// Towards zero. NaN is 0; out of range is the nearest of i32 or wider types, of which narrower ones
// take the low bits.
template <class To, class From>
inline To truncated(From x) {
  using Wide = std::conditional_t<(sizeof(To) < 4), int32_t, To>;
  if (x != x) return To(0);
  if constexpr (std::is_unsigned_v<Wide>) {
    if (x < From(0)) return static_cast<To>(truncated<int64_t>(x));
  }
  constexpr From kHigh = static_cast<From>(std::numeric_limits<Wide>::max() / 2 + 1) * From(2);
  if (x >= kHigh) return static_cast<To>(std::numeric_limits<Wide>::max());
  if (std::is_signed_v<Wide> && x <= -kHigh) return static_cast<To>(std::numeric_limits<Wide>::min());
  return static_cast<To>(static_cast<Wide>(x));
}

template <class To, class From>
inline To convert(From from, bool saturate = true, Round round = Round::kUp) {
  using Value = compute_t<From>;
  const Value x = static_cast<Value>(from);
  if constexpr (std::is_same_v<To, bool>) {
    return x != Value(0);
  } else if constexpr (std::is_same_v<To, float> || std::is_same_v<To, double>) {
    return static_cast<To>(x);
  } else if constexpr (std::is_integral_v<To>) {
    if constexpr (std::is_floating_point_v<Value>) {
      return truncated<To>(x);
    } else {
      return static_cast<To>(x);
    }
  } else if constexpr (IsNibble<To>::value) {
    if constexpr (std::is_floating_point_v<Value>) {
      return To(truncated<int32_t>(x));
    } else {
      return To(static_cast<int32_t>(x));
    }
  } else {
    float f;
    if constexpr (std::is_floating_point_v<Value>) {
      f = odd(x);
    } else {
      f = odd(static_cast<std::conditional_t<std::is_unsigned_v<Value>, uint64_t, int64_t>>(x));
    }
    if constexpr (std::is_same_v<To, f8e8m0>) {
      return To(f, saturate, round);
    } else if constexpr (std::is_same_v<To, half> || std::is_same_v<To, bfloat16>) {
      return To(f);
    } else {
      return To(f, saturate);
    }
  }
}

}  // namespace
}  // namespace qg
