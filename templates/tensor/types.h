// Element types that C++ lacks: f16 and bf16 are computed with as float and rounded to nearest even;
// types of 8 bits and less hold one value a byte.
#pragma once
#include <cstdint>
#include <cstring>

namespace qg {
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct half {
  uint16_t bits;
  half() = default;
  half(float x) {  // Giesen's method: the multiplication and additions round to nearest even
    const uint32_t f = bit_cast<uint32_t>(x);
    const uint32_t sign = f >> 16 & 0x8000u;
    const uint32_t magnitude = f & 0x7fffffffu;
    uint32_t r;
    if (magnitude > 0x7f800000u) {
      r = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {
      r = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      r = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      r = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
    }
    bits = static_cast<uint16_t>(r | sign);
  }
  operator float() const {
    const uint32_t magnitude = bits & 0x7fffu;
    const float finite = bit_cast<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112
    const uint32_t r = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : bit_cast<uint32_t>(finite);
    return bit_cast<float>(r | (bits & 0x8000u) << 16);
  }
};

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  bfloat16(float x) {
    const uint32_t f = bit_cast<uint32_t>(x);
    const bool nan = (f & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? f >> 16 | 0x40u : (f + 0x7fffu + (f >> 16 & 1u)) >> 16);
  }
  operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// The type that arithmetic on T is done in.
template <class T>
struct Compute {
  using type = T;
};
template <>
struct Compute<half> {
  using type = float;
};
template <>
struct Compute<bfloat16> {
  using type = float;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace
}  // namespace qg
