// Casts between any two element types.
#pragma once
#include "convert.h"
#include "tensor.h"

namespace qg {
namespace {

template <class Y, class X>
inline void cast(const Context& c, const Tensor& y, const Tensor& x, bool saturate, Round round) {
  const int64_t n = y.size(), last = c.end(n);
  Y* to = y.as<Y>();
  const X* from = x.as<X>();
  for (int64_t i = c.begin(n); i < last; ++i) to[i] = convert<Y>(from[i], saturate, round);
}

// The low bits of bytes as another type that is stored in a byte.
inline void copy_low_bits(const Context& c, const Tensor& y, const Tensor& x, int mask) {
  const int64_t n = y.size(), last = c.end(n);
  for (int64_t i = c.begin(n); i < last; ++i) {
    y.as<uint8_t>()[i] = static_cast<uint8_t>(x.as<uint8_t>()[i] & mask);
  }
}

}  // namespace
}  // namespace qg
