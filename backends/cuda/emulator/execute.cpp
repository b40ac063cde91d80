// What each lane does by itself: arithmetic, conversions, memory.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"
#include "numbers.h"

namespace ptx {

namespace {

template <class F>
void forLanes(uint32_t lanes, F f) {
  for (int l = 0; l < kLanes; ++l) {
    if (lanes >> l & 1) f(l);
  }
}

uint64_t maskOf(Type type) {
  const int bits = bitsOf(type);
  return bits >= 64 ? ~0ull : (1ull << bits) - 1;
}

uint64_t fromDouble(Type type, double value) {
  switch (type) {
    case Type::f16:
      return doubleToHalf(value);
    case Type::bf16:
      return doubleToBfloat(value);
    case Type::f64:
      return bitsAs<uint64_t>(value);
    default:
      return bitsAs<uint32_t>(float(value));
  }
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// min and max of the PTX ISA: a NaN loses against a number, -0 is less than +0.
template <class T>
T least(T a, T b) {
  if (std::isnan(a)) return std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : b;
  if (std::isnan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T greatest(T a, T b) {
  return -least<T>(-a, -b);
}

// a b + c of halves, rounded to odd: a later rounding to fewer bits is then the only one. The
// product is exact in a double; what the sum loses is known exactly (two-sum).
double fusedToOdd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product, lost = (product - (sum - back)) + (c - back);
  uint64_t bits = bitsAs<uint64_t>(sum);
  if (lost != 0 && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : -1;
  return bitsAs<double>(bits);
}

// One float operation, rounded once to T by the caller where T is narrower.
template <class T>
bool floatOperation(Op op, T a, T b, T c, T* out) {
  switch (op) {
    case Op::op_add:
      *out = a + b;
      return true;
    case Op::op_sub:
      *out = a - b;
      return true;
    case Op::op_mul:
      *out = a * b;
      return true;
    case Op::op_mad:
    case Op::op_fma:
      *out = std::fma(a, b, c);
      return true;
    case Op::op_div:
      *out = a / b;
      return true;
    case Op::op_min:
      *out = least(a, b);
      return true;
    case Op::op_max:
      *out = greatest(a, b);
      return true;
    default:
      return false;
  }
}

template <class S>
bool integerOperation(Op op, uint64_t x, uint64_t y, uint64_t* out) {
  using U = std::make_unsigned_t<S>;
  const U a = U(x), b = U(y);
  const S sa = S(x), sb = S(y);
  switch (op) {
    case Op::op_add:
      *out = U(a + b);
      return true;
    case Op::op_sub:
      *out = U(a - b);
      return true;
    case Op::op_min:
      *out = U(std::min(sa, sb));
      return true;
    case Op::op_max:
      *out = U(std::max(sa, sb));
      return true;
    // a division by zero has an unspecified result: all ones, as the hardware gives
    case Op::op_div:
      *out = !sb ? U(-1) : sb == S(-1) && std::is_signed_v<S> ? U(0 - a) : U(sa / sb);
      return true;
    case Op::op_rem:
      *out = !sb ? a : sb == S(-1) && std::is_signed_v<S> ? U(0) : U(sa % sb);
      return true;
    default:
      return false;
  }
}

}  // namespace

int64_t asInteger(Type type, uint64_t v) {
  switch (type) {
    case Type::s4:
      return int64_t(v << 60) >> 60;
    case Type::s8:
      return int8_t(v);
    case Type::s16:
      return int16_t(v);
    case Type::s32:
      return int32_t(v);
    case Type::s64:
      return int64_t(v);
    default:
      return int64_t(v & maskOf(type));
  }
}

double asDouble(Type type, uint64_t v) {
  switch (type) {
    case Type::f16:
      return halfToDouble(uint16_t(v));
    case Type::bf16:
      return bfloatToFloat(uint16_t(v));
    case Type::f32:
      return bitsAs<float>(uint32_t(v));
    case Type::f64:
      return bitsAs<double>(v);
    case Type::u64:
      return double(v);
    default:
      return double(asInteger(type, v));
  }
}

bool compareValues(Compare compare, Type type, uint64_t x, uint64_t y) {
  if (isFloat(type)) {
    const double a = asDouble(type, x), b = asDouble(type, y);
    const bool nan = std::isnan(a) || std::isnan(b);
    switch (compare) {
      case Compare::eq:
        return a == b;
      case Compare::ne:
        return !nan && a != b;
      case Compare::lt:
        return a < b;
      case Compare::le:
        return a <= b;
      case Compare::gt:
        return a > b;
      case Compare::ge:
        return a >= b;
      case Compare::equ:
        return nan || a == b;
      case Compare::neu:
        return nan || a != b;
      case Compare::ltu:
        return nan || a < b;
      case Compare::leu:
        return nan || a <= b;
      case Compare::gtu:
        return nan || a > b;
      case Compare::geu:
        return nan || a >= b;
      case Compare::num:
        return !nan;
      case Compare::nan:
        return nan;
    }
  }
  const int64_t sa = asInteger(type, x), sb = asInteger(type, y);
  const bool less = isSigned(type) ? sa < sb : uint64_t(sa) < uint64_t(sb);
  switch (compare) {
    case Compare::eq:
      return sa == sb;
    case Compare::ne:
      return sa != sb;
    case Compare::lt:
      return less;
    case Compare::le:
      return less || sa == sb;
    case Compare::gt:
      return !less && sa != sb;
    default:
      return !less;
  }
}

// The lanes in which every source register from operand `first` on is defined.
uint32_t Launch::sources(Warp& w, const Instruction& i, size_t first) {
  uint32_t all = kAllLanes;
  for (size_t n = first; n < i.operands.size(); ++n) {
    const Operand& o = i.operands[n];
    if (o.index >= 0) all &= w.defined[o.index];
    for (const Operand& p : o.parts) {
      if (p.index >= 0) all &= w.defined[p.index];
    }
  }
  return all;
}

void Launch::need(Warp& w, const Instruction& i, const Operand& o, uint32_t lanes,
                  const char* what) {
  if (o.index >= 0 && (lanes & ~w.defined[o.index])) fail(w, i, what);
}

void Launch::arithmetic(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand& to = i.operands[0];
  uint64_t* d = values(w, to);
  const uint64_t* s[5] = {};
  for (size_t n = 1; n < i.operands.size() && n < 6; ++n) s[n - 1] = values(w, i.operands[n]);
  const uint64_t *a = s[0], *b = s[1] ? s[1] : a, *c = s[2] ? s[2] : a;
  const Type t = i.type;
  const int bits = bitsOf(t);
  const uint64_t mask = maskOf(t);
  define(w, to, lanes, sources(w, i, 1));
  switch (i.op) {
    case Op::op_and:
      forLanes(lanes, [&](int l) { d[l] = a[l] & b[l] & mask; });
      return;
    case Op::op_or:
      forLanes(lanes, [&](int l) { d[l] = (a[l] | b[l]) & mask; });
      return;
    case Op::op_xor:
      forLanes(lanes, [&](int l) { d[l] = (a[l] ^ b[l]) & mask; });
      return;
    case Op::op_not:
      forLanes(lanes, [&](int l) { d[l] = t == Type::pred ? !a[l] : ~a[l] & mask; });
      return;
    case Op::op_cnot:
      forLanes(lanes, [&](int l) { d[l] = (a[l] & mask) == 0; });
      return;
    case Op::op_shl:
      forLanes(lanes, [&](int l) {
        const auto n = uint32_t(b[l]);
        d[l] = n >= uint32_t(bits) ? 0 : a[l] << n & mask;
      });
      return;
    case Op::op_shr:
      forLanes(lanes, [&](int l) {
        const uint32_t n = std::min<uint32_t>(uint32_t(b[l]), bits);
        if (isSigned(t)) {
          d[l] = uint64_t(asInteger(t, a[l]) >> std::min<uint32_t>(n, bits - 1)) & mask;
        } else {
          d[l] = n >= uint32_t(bits) ? 0 : (a[l] & mask) >> n;
        }
      });
      return;
    case Op::op_shf:
      forLanes(lanes, [&](int l) {
        const uint64_t pair = b[l] << 32 | uint32_t(a[l]);
        const uint32_t n = i.wraps ? uint32_t(c[l]) & 31 : std::min<uint32_t>(uint32_t(c[l]), 32);
        d[l] =
            i.left ? uint32_t((n == 32 ? pair << 31 << 1 : pair << n) >> 32) : uint32_t(pair >> n);
      });
      return;
    case Op::op_lop3: {
      const uint32_t table = uint32_t(s[3][0]);
      forLanes(lanes, [&](int l) {
        uint32_t result = 0;
        for (int row = 0; row < 8; ++row) {
          if (!(table >> row & 1)) continue;
          result |= uint32_t(row & 4 ? a[l] : ~a[l]) & uint32_t(row & 2 ? b[l] : ~b[l]) &
                    uint32_t(row & 1 ? c[l] : ~c[l]);
        }
        d[l] = result;
      });
      return;
    }
    case Op::op_prmt:
      forLanes(lanes, [&](int l) {
        const uint64_t pair = b[l] << 32 | uint32_t(a[l]);
        uint32_t result = 0;
        for (int n = 0; n < 4; ++n) {
          const auto select = uint32_t(c[l] >> (4 * n) & 15);
          auto byte = uint8_t(pair >> (8 * (select & 7)));
          if (select & 8) byte = byte & 0x80 ? 0xff : 0;
          result |= uint32_t(byte) << (8 * n);
        }
        d[l] = result;
      });
      return;
    case Op::op_bfe:
      forLanes(lanes, [&](int l) {
        const auto at = uint32_t(b[l] & 255), n = uint32_t(c[l] & 255);
        const uint64_t v = a[l] & mask;
        // bits past the end are copies of the sign bit
        const uint64_t sign =
            isSigned(t) && n ? v >> std::min<uint32_t>(at + n - 1, bits - 1) & 1 : 0;
        uint64_t r = at >= uint32_t(bits) ? 0 : v >> at;
        const uint32_t valid = at >= uint32_t(bits) ? 0 : std::min(n, bits - at);
        r &= valid >= 64 ? ~0ull : (1ull << valid) - 1;
        if (sign && valid < 64) r |= ~0ull << valid;
        d[l] = r & mask;
      });
      return;
    case Op::op_bfi:
      forLanes(lanes, [&](int l) {
        const auto at = uint32_t(c[l] & 255), n = uint32_t(s[3][l] & 255);
        uint64_t field = n >= 64 ? ~0ull : (1ull << n) - 1;
        field = at >= 64 ? 0 : field << at;
        d[l] = ((b[l] & ~field) | ((at >= 64 ? 0 : a[l] << at) & field)) & mask;
      });
      return;
    case Op::op_popc:
      forLanes(lanes, [&](int l) { d[l] = __builtin_popcountll(a[l] & mask); });
      return;
    case Op::op_clz:
      forLanes(lanes, [&](int l) {
        const uint64_t v = a[l] & mask;
        d[l] = v ? __builtin_clzll(v) - (64 - bits) : bits;
      });
      return;
    case Op::op_bfind:  // of a negative number the highest zero; all ones if there is no such bit
      forLanes(lanes, [&](int l) {
        uint64_t v = a[l] & mask;
        if (isSigned(i.type) && (v >> (bits - 1) & 1)) v = ~v & mask;
        const int found = v ? 63 - __builtin_clzll(v) : -1;
        d[l] = uint32_t(found < 0 || !i.shiftAmount ? found : bits - 1 - found);
      });
      return;
    case Op::op_brev:
      forLanes(lanes, [&](int l) {
        uint64_t r = 0;
        for (int n = 0; n < bits; ++n) r |= (a[l] >> n & 1) << (bits - 1 - n);
        d[l] = r;
      });
      return;
    case Op::op_dp4a:
      forLanes(lanes, [&](int l) {
        int64_t sum = int32_t(c[l]);
        for (int n = 0; n < 4; ++n) {
          const auto byte = [&](Type type, uint64_t v) {
            return asInteger(isSigned(type) ? Type::s8 : Type::u8, v >> (8 * n) & 255);
          };
          sum += byte(i.type, a[l]) * byte(i.from, b[l]);
        }
        d[l] = uint32_t(sum);
      });
      return;
    case Op::op_selp:
      need(w, i, i.operands[3], lanes, "a choice by a predicate that nobody computed");
      define(w, to, lanes, kAllLanes);
      forLanes(lanes, [&](int l) {
        const bool first = (c[l] != 0) != i.operands[3].negated;
        const Operand& chosen = i.operands[first ? 1 : 2];
        d[l] = (first ? a : b)[l] & mask;
        if (!(defined(w, chosen) >> l & 1)) defined(w, to) &= ~(1u << l);
      });
      return;
    case Op::op_neg:
    case Op::op_abs: {
      const bool negates = i.op == Op::op_neg;
      uint64_t sign = isFloat(t) ? 1ull << (bits - 1) : 0;
      if (t == Type::f16x2 || t == Type::bf16x2) sign = 0x80008000u;
      forLanes(lanes, [&](int l) {
        if (sign) {
          d[l] = (negates ? a[l] ^ sign : a[l] & ~sign) & mask;
        } else {
          const int64_t v = asInteger(t, a[l]);
          d[l] = (negates || v < 0 ? 0 - uint64_t(v) : uint64_t(v)) & mask;
        }
      });
      return;
    }
    case Op::op_ex2:
    case Op::op_lg2:
    case Op::op_rcp:
    case Op::op_sqrt:
    case Op::op_rsqrt:
      if (t != Type::f32) fail(w, i, "not known for this type");
      forLanes(lanes, [&](int l) {
        float x = bitsAs<float>(uint32_t(a[l]));
        if (i.flushes) x = flushed(x);
        float y = i.op == Op::op_ex2    ? float(std::exp2(double(x)))
                  : i.op == Op::op_lg2  ? float(std::log2(double(x)))
                  : i.op == Op::op_rcp  ? 1.0f / x
                  : i.op == Op::op_sqrt ? std::sqrt(x)
                                        : float(1.0 / std::sqrt(double(x)));
        d[l] = bitsAs<uint32_t>(i.flushes ? flushed(y) : y);
      });
      return;
    case Op::op_mul:
    case Op::op_mad:
      if (!isFloat(t) && t != Type::f16x2 && t != Type::bf16x2) {
        integerWide(w, i, lanes);
        return;
      }
      break;
    default:
      break;
  }
  bool known = true;
  if (t == Type::f32) {
    forLanes(lanes, [&](int l) {
      float x = bitsAs<float>(uint32_t(a[l])), y = bitsAs<float>(uint32_t(b[l])),
            z = bitsAs<float>(uint32_t(c[l])), r = 0;
      if (i.flushes) x = flushed(x), y = flushed(y), z = flushed(z);
      known = floatOperation(i.op, x, y, z, &r);
      if (i.flushes) r = flushed(r);
      if (i.saturate) r = std::isnan(r) ? 0 : std::min(std::max(r, 0.0f), 1.0f);
      d[l] = bitsAs<uint32_t>(r);
    });
  } else if (isFloat(t) || t == Type::f16x2 || t == Type::bf16x2) {
    const Type one = t == Type::f16x2 ? Type::f16 : t == Type::bf16x2 ? Type::bf16 : t;
    forLanes(lanes, [&](int l) {
      uint64_t result = 0;
      for (int at = 0; at < bits; at += bitsOf(one)) {
        double r = 0;
        if (i.op == Op::op_fma && one != Type::f64) {
          result |= fromDouble(one, fusedToOdd(asDouble(one, a[l] >> at), asDouble(one, b[l] >> at),
                                               asDouble(one, c[l] >> at)))
                    << at;
          continue;
        }
        known = floatOperation(i.op, asDouble(one, a[l] >> at), asDouble(one, b[l] >> at),
                               asDouble(one, c[l] >> at), &r);
        result |= fromDouble(one, r) << at;
      }
      d[l] = result;
    });
  } else {
    forLanes(lanes, [&](int l) {
      const bool sign = isSigned(t);
      if (bits == 64) {
        known = sign ? integerOperation<int64_t>(i.op, a[l], b[l], &d[l])
                     : integerOperation<uint64_t>(i.op, a[l], b[l], &d[l]);
      } else if (bits == 32) {
        known = sign ? integerOperation<int32_t>(i.op, a[l], b[l], &d[l])
                     : integerOperation<uint32_t>(i.op, a[l], b[l], &d[l]);
      } else {
        known = sign ? integerOperation<int16_t>(i.op, a[l], b[l], &d[l])
                     : integerOperation<uint16_t>(i.op, a[l], b[l], &d[l]);
      }
    });
  }
  if (!known) fail(w, i, "not known for this type");
}

// mul and mad of integers: low, high or all of the product.
void Launch::integerWide(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t* d = values(w, i.operands[0]);
  const uint64_t *a = values(w, i.operands[1]), *b = values(w, i.operands[2]);
  const uint64_t* c = i.operands.size() > 3 ? values(w, i.operands[3]) : nullptr;
  const int bits = bitsOf(i.type), outBits = i.part == Part::wide ? 2 * bits : bits;
  const uint64_t mask = outBits >= 64 ? ~0ull : (1ull << outBits) - 1;
  forLanes(lanes, [&](int l) {
    uint64_t r;
    if (bits == 64 && i.part == Part::high) {
      r = isSigned(i.type) ? uint64_t(__int128(int64_t(a[l])) * int64_t(b[l]) >> 64)
                           : uint64_t((unsigned __int128)(a[l]) * b[l] >> 64);
    } else {
      r = uint64_t(asInteger(i.type, a[l])) * uint64_t(asInteger(i.type, b[l]));
      if (i.part == Part::high) r = isSigned(i.type) ? uint64_t(int64_t(r) >> bits) : r >> bits;
    }
    if (c) r += c[l];
    d[l] = r & mask;
  });
}

void Launch::convert(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand& to = i.operands[0];
  uint64_t* d = values(w, to);
  const uint64_t* a = values(w, i.operands[1]);
  const Type into = i.type, from = i.from;
  define(w, to, lanes, sources(w, i, 1));
  if (into == Type::f16x2 || into == Type::bf16x2) {  // the first source is the upper half
    const uint64_t* b = values(w, i.operands[2]);
    const Type one = into == Type::f16x2 ? Type::f16 : Type::bf16;
    forLanes(lanes, [&](int l) {
      d[l] = fromDouble(one, asDouble(from, a[l])) << 16 | fromDouble(one, asDouble(from, b[l]));
    });
    return;
  }
  if (isFloat(into) && i.round == Round::zero) fail(w, i, "rounding that is not known");
  forLanes(lanes, [&](int l) {
    if (isFloat(into)) {
      if (!isFloat(from) && into == Type::f32) {  // once, not by way of a double
        const int64_t v = asInteger(from, a[l]);
        d[l] = bitsAs<uint32_t>(from == Type::u64 ? float(uint64_t(v)) : float(v));
        return;
      }
      double v = asDouble(from, a[l]);
      if (isFloat(from) && i.round >= Round::toInteger) {
        v = i.round == Round::toInteger       ? std::nearbyint(v)
            : i.round == Round::toIntegerZero ? std::trunc(v)
            : i.round == Round::toIntegerDown ? std::floor(v)
                                              : std::ceil(v);
      }
      if (i.saturate) v = std::isnan(v) ? 0 : std::min(std::max(v, 0.0), 1.0);
      d[l] = fromDouble(into, v);
    } else if (isFloat(from)) {  // out of range: the nearest; NaN: zero
      double v = asDouble(from, a[l]);
      v = i.round == Round::toInteger       ? std::nearbyint(v)
          : i.round == Round::toIntegerDown ? std::floor(v)
          : i.round == Round::toIntegerUp   ? std::ceil(v)
                                            : std::trunc(v);
      const int bits = bitsOf(into);
      if (std::isnan(v)) v = 0;
      if (isSigned(into)) {
        const double limit = std::ldexp(1.0, bits - 1);
        const int64_t r = v >= limit   ? int64_t((1ull << (bits - 1)) - 1)
                          : v < -limit ? -int64_t(1ull << (bits - 2)) * 2
                                       : int64_t(v);
        d[l] = uint64_t(r) & maskOf(into);
      } else {
        const double limit = std::ldexp(1.0, bits);
        d[l] = v >= limit ? maskOf(into) : v < 0 ? 0 : uint64_t(v);
      }
    } else {
      int64_t v = asInteger(from, a[l]);
      if (i.saturate) {
        const int bits = bitsOf(into);
        const int64_t high = isSigned(into) ? (1ll << (bits - 1)) - 1 : (1ll << bits) - 1;
        v = std::min<int64_t>(std::max<int64_t>(v, isSigned(into) ? -high - 1 : 0), high);
      }
      // narrow results are extended to the register by their own sign
      d[l] = isSigned(into) && bitsOf(into) < 32 ? uint32_t(asInteger(into, uint64_t(v)))
                                                 : uint64_t(v) & maskOf(into);
    }
  });
}

void Launch::move(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const uint64_t mask = maskOf(i.type);
  if (to.kind == Operand::list) {  // unpack
    const int bits = bitsOf(i.type) / int(to.parts.size());
    uint64_t source[kLanes];
    std::memcpy(source, values(w, from), sizeof source);
    const uint32_t known = defined(w, from);
    for (size_t n = 0; n < to.parts.size(); ++n) {
      if (to.parts[n].kind == Operand::sink) continue;
      uint64_t* d = values(w, to.parts[n]);
      forLanes(lanes, [&](int l) { d[l] = source[l] >> (n * bits) & ((1ull << bits) - 1); });
      define(w, to.parts[n], lanes, known);
    }
  } else if (from.kind == Operand::list) {  // pack
    const int bits = bitsOf(i.type) / int(from.parts.size());
    uint64_t packed[kLanes] = {};
    for (size_t n = 0; n < from.parts.size(); ++n) {
      const uint64_t* s = values(w, from.parts[n]);
      for (int l = 0; l < kLanes; ++l) packed[l] |= (s[l] & ((1ull << bits) - 1)) << (n * bits);
    }
    const uint32_t known = sources(w, i, 1);
    forLanes(lanes, [&](int l) { values(w, to)[l] = packed[l]; });
    define(w, to, lanes, known);
  } else {
    const uint32_t known = defined(w, from);
    forLanes(lanes, [&](int l) { values(w, to)[l] = values(w, from)[l] & mask; });
    define(w, to, lanes, known);
  }
}

void Launch::compareAndSet(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = values(w, i.operands[1]), *b = values(w, i.operands[2]);
  const bool combined = i.combine != Bool::none;
  const uint64_t* c = combined ? values(w, i.operands[3]) : nullptr;
  const uint32_t known = sources(w, i, 1);
  uint32_t first = 0, second = 0;
  forLanes(lanes, [&](int l) {
    bool yes = compareValues(i.compare, i.type, a[l], b[l]), no = !yes;
    if (combined) {
      const bool also = (c[l] != 0) != i.operands[3].negated;
      const auto join = [&](bool x) {
        return i.combine == Bool::land ? x && also : i.combine == Bool::lor ? x || also : x != also;
      };
      yes = join(yes), no = join(no);
    }
    first |= uint32_t(yes) << l;
    second |= uint32_t(no) << l;
  });
  const auto put = [&](const Operand& o, uint32_t bits) {
    if (o.kind != Operand::reg) return;
    forLanes(lanes, [&](int l) { values(w, o)[l] = bits >> l & 1; });
    define(w, o, lanes, known);
  };
  put(i.operands[0], first);
  put(i.second, second);
}

void Launch::load(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const auto part = [&](int n) -> const Operand& { return i.vector > 1 ? to.parts.at(n) : to; };
  const uint32_t each = bytesOf(i.type), total = each * i.vector;
  if (i.space == Space::param) {
    if (uint64_t(from.offset) + total > parameters_.size()) fail(w, i, "read past the parameters");
    for (int n = 0; n < i.vector; ++n) {
      uint64_t v = 0;
      std::memcpy(&v, &parameters_[from.offset + n * each], each);
      if (isSigned(i.type) && each < 4) v = uint32_t(asInteger(i.type, v));
      forLanes(lanes, [&](int l) { values(w, part(n))[l] = v; });
      define(w, part(n), lanes, kAllLanes);
    }
    return;
  }
  need(w, i, from, lanes, "an address that nobody computed");
  uint64_t addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) addresses[l] = values(w, from)[l] + from.offset;
  forLanes(lanes, [&](int l) {
    const uint8_t* bytes = access(w, i, i.space, addresses[l], total, false, l);
    for (int n = 0; n < i.vector; ++n) {
      if (part(n).kind == Operand::sink) continue;
      uint64_t v = 0;
      std::memcpy(&v, bytes + n * each, each);
      if (isSigned(i.type) && each < 4) v = uint32_t(asInteger(i.type, v));
      values(w, part(n))[l] = v;
    }
  });
  for (int n = 0; n < i.vector; ++n) {
    if (part(n).kind != Operand::sink) define(w, part(n), lanes, kAllLanes);
  }
  if (i.space == Space::shared) countShared(countOf(i), addresses, lanes, total);
  if (i.space == Space::global) countGlobal(countOf(i), addresses, lanes, total, false);
}

void Launch::store(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const auto part = [&](int n) -> const Operand& { return i.vector > 1 ? from.parts.at(n) : from; };
  const uint32_t each = bytesOf(i.type), total = each * i.vector;
  need(w, i, to, lanes, "an address that nobody computed");
  for (int n = 0; n < i.vector; ++n) {
    need(w, i, part(n), lanes, "a store of a value that nobody computed");
  }
  uint64_t addresses[kLanes];
  for (int l = 0; l < kLanes; ++l) addresses[l] = values(w, to)[l] + to.offset;
  forLanes(lanes, [&](int l) {
    uint8_t* bytes = access(w, i, i.space, addresses[l], total, true, l);
    for (int n = 0; n < i.vector; ++n) {
      std::memcpy(bytes + n * each, &values(w, part(n))[l], each);
    }
  });
  if (i.space == Space::shared) countShared(countOf(i), addresses, lanes, total);
  if (i.space == Space::global) countGlobal(countOf(i), addresses, lanes, total, true);
}

void Launch::atomic(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool returns = i.op == Op::op_atom;
  const Operand &to = i.operands[0], &at = i.operands[returns];
  const uint64_t* value = values(w, i.operands[returns + 1]);
  const uint64_t* swap = i.atomic == Atomic::cas ? values(w, i.operands[returns + 2]) : nullptr;
  const uint32_t each = bytesOf(i.type);
  const Type t = i.type, one = t == Type::f16x2 ? Type::f16 : t == Type::bf16x2 ? Type::bf16 : t;
  if (lanes & ~sources(w, i, returns)) fail(w, i, "an atomic on values that nobody computed");
  forLanes(lanes, [&](int l) {
    const uint64_t address = values(w, at)[l] + at.offset;
    uint8_t* bytes;
    if (i.space == Space::shared) {
      bytes = &w.block->shared.at(uint32_t(address));
      for (uint32_t b = 0; b < each; ++b) {
        SharedByte& s = w.block->bytes[uint32_t(address) + b];
        if (!s.written) fail(w, i, "an atomic on shared memory that nobody wrote");
        if (s.writeEpoch == w.block->epoch && s.writer != w.id) {
          fail(w, i, "race in shared memory: atomic after a plain write by another warp");
        }
      }
    } else {
      global(w, i, address, each, each, false, false);
      bytes = global(w, i, address, each, each, true, false);
    }
    uint64_t old = 0, result = 0;
    std::memcpy(&old, bytes, each);
    const uint64_t x = value[l] & maskOf(t);
    switch (i.atomic) {
      case Atomic::add:
        if (isFloat(one)) {
          for (int b = 0; b < int(8 * each); b += bitsOf(one)) {
            result |= fromDouble(one, asDouble(one, old >> b) + asDouble(one, x >> b)) << b;
          }
        } else {
          result = old + x;
        }
        break;
      case Atomic::min:
        result = compareValues(Compare::lt, t, x, old) ? x : old;
        break;
      case Atomic::max:
        result = compareValues(Compare::gt, t, x, old) ? x : old;
        break;
      case Atomic::land:
        result = old & x;
        break;
      case Atomic::lor:
        result = old | x;
        break;
      case Atomic::lxor:
        result = old ^ x;
        break;
      case Atomic::exch:
        result = x;
        break;
      case Atomic::cas:
        result = old == x ? swap[l] : old;
        break;
      case Atomic::inc:
        result = old >= x ? 0 : old + 1;
        break;
    }
    std::memcpy(bytes, &result, each);
    if (returns && to.kind == Operand::reg) values(w, to)[l] = old;
  });
  if (returns && to.kind == Operand::reg) define(w, to, lanes, kAllLanes);
}

void Launch::asyncCopy(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.async != Async::copy) {
    if (lanes != w.live) fail(w, i, "groups of cp.async in a part of a warp");
    if (i.async == Async::commit) {
      w.groups.push_back(std::move(w.open));
      w.open.clear();
      return;
    }
    size_t pending = 0;
    if (i.async == Async::waitGroup) {
      pending = size_t(values(w, i.operands[0])[0]);
    } else {
      finishCopies(w, i, w.open);
      w.open.clear();
    }
    while (w.groups.size() > pending) {
      finishCopies(w, i, w.groups.front());
      w.groups.pop_front();
    }
    return;
  }
  const Operand &to = i.operands[0], &from = i.operands[1];
  need(w, i, to, lanes, "an address that nobody computed");
  need(w, i, from, lanes, "an address that nobody computed");
  const auto bytes = uint32_t(values(w, i.operands[2])[0]);
  const bool partial = i.operands.size() > size_t(i.hint ? 4 : 3);
  uint64_t sources[kLanes], destinations[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    sources[l] = values(w, from)[l] + from.offset;
    destinations[l] = uint32_t(values(w, to)[l] + to.offset);
  }
  uint32_t reading = 0;
  forLanes(lanes, [&](int l) {
    const uint32_t read = partial ? uint32_t(values(w, i.operands[3])[l]) : bytes;
    const Copy copy{uint32_t(destinations[l]), sources[l], bytes, read, l};
    startCopy(w, i, copy);
    w.open.push_back(copy);
    if (read) reading |= 1u << l;
  });
  countShared(countOf(i), destinations, lanes, bytes);
  if (reading) countGlobal(countOf(i), sources, reading, bytes, false);
}

bool Launch::execute(Warp& w, const Instruction& i, uint32_t lanes) {
  switch (i.op) {
    case Op::op_mov:
      move(w, i, lanes);
      return true;
    case Op::op_cvt:
      convert(w, i, lanes);
      return true;
    case Op::op_setp:
      compareAndSet(w, i, lanes);
      return true;
    case Op::op_ld:
      load(w, i, lanes);
      return !i.synchronizes;
    case Op::op_st:
      store(w, i, lanes);
      return true;
    case Op::op_atom:
    case Op::op_red:
      atomic(w, i, lanes);
      return i.atomic != Atomic::cas;
    case Op::op_cp:
      asyncCopy(w, i, lanes);
      return true;
    case Op::op_ldmatrix:
      loadMatrix(w, i, lanes);
      return true;
    case Op::op_mma:
      multiplyMatrices(w, i, lanes);
      return true;
    case Op::op_shfl:
      shuffle(w, i, lanes);
      return true;
    case Op::op_vote:
      vote(w, i, lanes);
      return true;
    case Op::op_activemask:
      forLanes(lanes, [&](int l) { values(w, i.operands[0])[l] = lanes; });
      define(w, i.operands[0], lanes, kAllLanes);
      return true;
    case Op::op_cvta: {
      const uint64_t window = i.space == Space::shared ? kSharedWindow : 0;
      forLanes(lanes, [&](int l) {
        const uint64_t v = values(w, i.operands[1])[l];
        values(w, i.operands[0])[l] = i.toSpace ? v - window : v + window;
      });
      define(w, i.operands[0], lanes, sources(w, i, 1));
      return true;
    }
    case Op::op_membar:
    case Op::op_fence:
      fences_[w.block->id] = ++w.block->fences;
      return true;
    case Op::op_createpolicy:
      forLanes(lanes, [&](int l) { values(w, i.operands[0])[l] = 0; });
      define(w, i.operands[0], lanes, kAllLanes);
      return true;
    case Op::op_bar:
    case Op::op_barrier:  // of a warp: its lanes came here together
    case Op::op_prefetch:
      return true;
    case Op::op_nanosleep:
      return false;
    case Op::op_trap:
      fail(w, i, "trap");
    default:
      arithmetic(w, i, lanes);
      return true;
  }
}

}  // namespace ptx
