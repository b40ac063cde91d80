// What sums of products have in common: the types they are made in, and sums in lanes, which the
// compiler turns into vectors.
#pragma once
#include "tensor.h"

namespace qg {
namespace {

// The type that products of T are summed in; integers wrap around, which unsigned ones may.
template <class T>
struct SumOf {
  using type = compute_t<T>;
};
template <>
struct SumOf<int32_t> {
  using type = uint32_t;
};
template <>
struct SumOf<int64_t> {
  using type = uint64_t;
};
template <>
struct SumOf<int16_t> {
  using type = uint32_t;
};
template <>
struct SumOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct SumOf<int8_t> {
  using type = uint32_t;
};
template <>
struct SumOf<uint8_t> {
  using type = uint32_t;
};
template <class T>
using sum_t = typename SumOf<T>::type;

constexpr int kLanes = 16;

// The sum of term(i) for i below n, as A.
template <class A, class Term>
inline A sum_terms(int64_t n, const Term& term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<A>(term(i + j));
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += static_cast<A>(term(i));
  for (int half = kLanes / 2; half; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// A number as an 8-bit code: rounded half to even, moved by zero, saturated. NaN becomes zero.
template <class Q>
inline Q code_of(double x, int32_t zero) {
  const double low = static_cast<Q>(-1) < 0 ? -128 : 0, high = static_cast<Q>(-1) < 0 ? 127 : 255;
  const double q = __builtin_rint(x) + zero;
  return static_cast<Q>(static_cast<int32_t>(q > high ? high : q > low ? q : q != q ? zero : low));
}

// Number i of a list that has one number for all, or one each.
template <class T>
inline compute_t<T> each(const Tensor& t, int64_t i) {
  return static_cast<compute_t<T>>(t.as<T>()[t.size() == 1 ? 0 : i]);
}

}  // namespace
}  // namespace qg
