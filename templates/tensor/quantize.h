// Quantization and dequantization with scales and zero points by tensor, axis or block.
#pragma once
#include "convert.h"
#include "tensor.h"

namespace qg {
namespace {

// The least and the largest number of an integer type.
template <class T>
struct Range {
  static constexpr int64_t low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
};
template <int kBits, bool kSigned>
struct Range<Nibble<kBits, kSigned>> {
  static constexpr int64_t low = kSigned ? -(1 << (kBits - 1)) : 0, high = low + (1 << kBits) - 1;
};

// y = saturate(nearest(x / scale) + zero): the quotient is rounded to P.
template <class Y, class P, class Z>
inline Y quantized(P quotient, Z zero, bool saturate) {
  if constexpr (std::is_floating_point_v<compute_t<Y>>) {
    return convert<Y>(static_cast<float>(quotient) + static_cast<float>(zero), saturate);
  } else {
    const int64_t q = int64_t{truncated<int32_t>(__builtin_nearbyint(static_cast<double>(quotient)))} + static_cast<int64_t>(zero);
    return Y(static_cast<compute_t<Y>>(max(Range<Y>::low, min(Range<Y>::high, q))));
  }
}

// x / scale with the precision P.
template <class P, class X, class S>
inline compute_t<P> quotient(X x, S scale) {
  return static_cast<compute_t<P>>(convert<P>(static_cast<compute_t<P>>(convert<P>(x)) / static_cast<compute_t<P>>(convert<P>(scale))));
}

// Where the scale of each element is: f(first, n, scale, step) for runs of n elements, the first of
// which has the scale number `scale`, and each next one the scale `step` further.
//
// A scale for the tensor has one element; one for an axis (block 0) as many as the axis; those of
// blocks are a tensor as x with fewer elements in that axis. False if the scale is none of these.
template <class F>
inline bool for_scales(const Context& c, const Tensor& x, const Tensor& scale, int64_t axis, int64_t block, const F& f) {
  const int64_t n = x.size();
  if (block == 0 && scale.size() == 1) {
    const int64_t first = c.begin(n);
    f(first, c.end(n) - first, int64_t{0}, int64_t{0});
    return true;
  }
  const int at = static_cast<int>(axis);
  const int64_t size = x.shape[at], inner = x.count(at + 1, x.rank), outer = x.count(0, at);
  const int64_t width = block ? block : 1;
  const int64_t parts = (size + width - 1) / width;
  if (block) {
    if (scale.rank != x.rank) return false;
    for (int i = 0; i < x.rank; ++i) {
      if (scale.shape[i] != (i == at ? parts : x.shape[i])) return false;
    }
  } else if (scale.size() != size) {
    return false;
  }
  if (!block && inner == 1) {  // every row has all scales
    for (int64_t o = c.begin(outer); o < c.end(outer); ++o) f(o * size, size, int64_t{0}, int64_t{1});
    return true;
  }
  const int64_t rows = outer * size;
  for (int64_t r = c.begin(rows); r < c.end(rows); ++r) {
    const int64_t part = r % size / width;
    if (block) {
      f(r * inner, inner, (r / size * parts + part) * inner, int64_t{1});
    } else {
      f(r * inner, inner, part, int64_t{0});
    }
  }
  return true;
}

template <class Y, class X, class S, class P>
inline void quantize_linear(const Context& c, const Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& zero, int64_t axis, int64_t block, bool saturate, const char* wrong) {
  if (zero && zero.size() != scale.size()) return c.fail(wrong);
  const X* from = x.as<X>();
  const S* s = scale.as<S>();
  const Y* z = zero.as<Y>();
  Y* to = y.as<Y>();
  const bool good = for_scales(c, x, scale, axis, block, [&](int64_t first, int64_t n, int64_t at, int64_t step) {
    for (int64_t i = 0; i < n; ++i, at += step) {
      const compute_t<Y> offset = z ? static_cast<compute_t<Y>>(z[at]) : compute_t<Y>(0);
      to[first + i] = quantized<Y>(quotient<P>(from[first + i], s[at]), offset, saturate);
    }
  });
  if (!good) c.fail(wrong);
}

// y = (x - zero) * scale, rounded once.
template <class Y, class X, class S>
inline void dequantize_linear(const Context& c, const Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& zero, int64_t axis, int64_t block, const char* wrong) {
  if (zero && zero.size() != scale.size()) return c.fail(wrong);
  using V = std::conditional_t<std::is_floating_point_v<compute_t<X>>, float, int64_t>;
  const X* from = x.as<X>();
  const S* s = scale.as<S>();
  const X* z = zero.as<X>();
  Y* to = y.as<Y>();
  const bool good = for_scales(c, x, scale, axis, block, [&](int64_t first, int64_t n, int64_t at, int64_t step) {
    for (int64_t i = 0; i < n; ++i, at += step) {
      const V offset = z ? static_cast<V>(static_cast<compute_t<X>>(z[at])) : V(0);
      const V v = static_cast<V>(static_cast<compute_t<X>>(from[first + i])) - offset;
      to[first + i] = static_cast<Y>(static_cast<float>(v) * static_cast<float>(s[at]));
    }
  });
  if (!good) c.fail(wrong);
}

// x as u8 with the scale and zero point that cover its range and 0.
inline void dynamic_quantize(const Context& c, const Tensor& y, const Tensor& scale, const Tensor& zero, const Tensor& x) {
  const int64_t n = x.size();
  const float* from = x.as<float>();
  uint8_t* to = y.as<uint8_t>();
  float low = 0, high = 0;
  const auto widen = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      low = from[i] < low ? from[i] : low;
      high = from[i] > high ? from[i] : high;
    }
  };
  if (n < 64 * int64_t{c.threads}) {
    widen(0, n);
  } else {  // the threads' ranges meet in y, which is not written yet
    widen(c.begin(n), c.end(n));
    const float own[2] = {low, high};
    std::memcpy(to + sizeof own * static_cast<size_t>(c.thread), own, sizeof own);
    c.wait();
    for (int i = 0; i < c.threads; ++i) {
      float other[2];
      std::memcpy(other, to + sizeof other * static_cast<size_t>(i), sizeof other);
      low = other[0] < low ? other[0] : low;
      high = other[1] > high ? other[1] : high;
    }
    c.wait();
  }
  const float s = high > low ? (high - low) / 255.0f : 1.0f;
  const uint8_t z = quantized<uint8_t>(-low / s, 0, true);
  if (c.thread == 0) {
    *scale.as<float>() = s;
    *zero.as<uint8_t>() = z;
  }
  for (int64_t i = c.begin(n); i < c.end(n); ++i) to[i] = quantized<uint8_t>(from[i] / s, z, true);
}

}  // namespace
}  // namespace qg
