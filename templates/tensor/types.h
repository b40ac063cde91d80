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

// What the codes of a minifloat with the largest exponent mean.
enum class Special {
  kInfinite,  // as IEEE: infinities and NaN
  kNan,       // NaN where exponent and mantissa are all ones, nothing is infinite
  kZero,      // NaN in the place of -0, nothing is infinite
  kNone,      // numbers
};

// A float of at most 8 bits: sign, kExponent and kMantissa bits.
template <int kExponent, int kMantissa, int kBias, Special kSpecial>
struct Minifloat {
  static constexpr uint32_t kSign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t kMost =  // code of the largest finite number
      kSpecial == Special::kInfinite ? kSign - 1 - (1u << kMantissa) : kSpecial == Special::kNan ? kSign - 2 : kSign - 1;
  static constexpr uint32_t kQuiet = kSpecial == Special::kInfinite ? kMost + 1 + (1u << (kMantissa - 1))
                                     : kSpecial == Special::kNan    ? kSign - 1
                                     : kSpecial == Special::kZero   ? kSign
                                                                    : 0;
  uint8_t bits;

  Minifloat() = default;
  // To nearest even. What is too large becomes the largest number if it saturates, else infinite or
  // NaN as far as the type has these.
  Minifloat(float x, bool saturate = true) {
    const uint32_t f = bit_cast<uint32_t>(x);
    const uint32_t sign = f >> 31 ? kSign : 0;
    const uint32_t magnitude = f & 0x7fffffffu;
    constexpr uint32_t kShift = 23 - kMantissa;
    constexpr uint32_t kUnit = (128u - kBias + kShift) << 23;  // its last place is that of the least numbers
    uint32_t r;
    if (magnitude > 0x7f800000u) {
      bits = static_cast<uint8_t>(kSpecial == Special::kNone ? kSign : kSpecial == Special::kZero ? kQuiet : kQuiet | sign);
      return;
    }
    if (magnitude < (128u - kBias) << 23) {
      r = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(kUnit)) - kUnit;
    } else {
      const uint32_t even = magnitude >> kShift & 1u;
      r = (magnitude + (1u << (kShift - 1)) - 1 + even - ((127u - kBias) << 23)) >> kShift;
    }
    if (r > kMost) r = saturate || kSpecial == Special::kNone ? kMost : kSpecial == Special::kInfinite ? kMost + 1 : kQuiet;
    if (kSpecial == Special::kZero && (r == 0 || r == kQuiet)) {
      bits = static_cast<uint8_t>(r);
    } else {
      bits = static_cast<uint8_t>(r | sign);
    }
  }
  operator float() const {
    const uint32_t code = bits & (kSign - 1);
    const uint32_t sign = (bits & kSign) != 0 ? 0x80000000u : 0u;
    if (kSpecial == Special::kZero && (bits & (2 * kSign - 1)) == kQuiet) return bit_cast<float>(0x7fc00000u);
    if (kSpecial == Special::kNan && code == kQuiet) return bit_cast<float>(0x7fc00000u | sign);
    if (kSpecial == Special::kInfinite && code > kMost) {
      return bit_cast<float>((code == kMost + 1 ? 0x7f800000u : 0x7fc00000u) | sign);
    }
    constexpr float kScale = kBias == 1 ? 8.507059173023462e37f /* 2^126 */
                             : kBias == 7 ? 1.329227995784916e36f /* 2^120 */
                             : kBias == 8 ? 6.646139978924579e35f /* 2^119 */
                             : kBias == 15 ? 5.192296858534828e33f /* 2^112 */
                                           : 2.596148429267414e33f /* 2^111 */;
    static_assert(kBias == 1 || kBias == 7 || kBias == 8 || kBias == 15 || kBias == 16, "a known scale");
    return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(code << (23 - kMantissa)) * kScale) | sign);
  }
};

using f8e4m3fn = Minifloat<4, 3, 7, Special::kNan>;
using f8e4m3fnuz = Minifloat<4, 3, 8, Special::kZero>;
using f8e5m2 = Minifloat<5, 2, 15, Special::kInfinite>;
using f8e5m2fnuz = Minifloat<5, 2, 16, Special::kZero>;
using f4e2m1 = Minifloat<2, 1, 1, Special::kNone>;

// A power of two: 2^(bits - 127), or NaN.
enum class Round { kUp, kDown, kNearest };
struct f8e8m0 {
  uint8_t bits;
  f8e8m0() = default;
  // The sign is dropped. What is out of range becomes the nearest power if it saturates, else NaN.
  f8e8m0(float x, bool saturate = true, Round round = Round::kUp) {
    const uint32_t f = bit_cast<uint32_t>(x) & 0x7fffffffu;
    uint32_t code = f >> 23, rest = f & 0x7fffffu;
    if (f > 0x7f800000u || (f == 0x7f800000u && !saturate) || (f < 0x400000u && !saturate)) {
      bits = 0xff;
      return;
    }
    if (code == 0) rest = rest < 0x400000u ? 0 : 2 * (rest - 0x400000u);  // between 2^-127 and 2^-126
    if (round == Round::kUp ? rest != 0 : round == Round::kNearest && rest >= 0x400000u) ++code;
    bits = static_cast<uint8_t>(code < 0xff ? code : saturate ? 0xfe : 0xff);
  }
  operator float() const {
    const uint32_t code = bits;
    return bit_cast<float>(code == 0xff ? 0x7fc00000u : code == 0 ? 0x400000u : code << 23);
  }
};

// An integer of kBits bits in the low end of a byte.
template <int kBits, bool kSigned>
struct Nibble {
  uint8_t bits;
  Nibble() = default;
  Nibble(int32_t x) : bits(static_cast<uint8_t>(x & ((1 << kBits) - 1))) {}  // higher bits are dropped
  operator int32_t() const {
    const int32_t x = bits & ((1 << kBits) - 1);
    return kSigned && x >> (kBits - 1) ? x - (1 << kBits) : x;
  }
};

using int4 = Nibble<4, true>;
using uint4 = Nibble<4, false>;
using int2 = Nibble<2, true>;
using uint2 = Nibble<2, false>;

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
template <int kExponent, int kMantissa, int kBias, Special kSpecial>
struct Compute<Minifloat<kExponent, kMantissa, kBias, kSpecial>> {
  using type = float;
};
template <>
struct Compute<f8e8m0> {
  using type = float;
};
template <int kBits, bool kSigned>
struct Compute<Nibble<kBits, kSigned>> {
  using type = int32_t;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace
}  // namespace qg
