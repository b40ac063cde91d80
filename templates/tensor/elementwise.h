// Elementwise kernels of any type: map, zip and zip3 apply a functor to one, two or three operands.
#pragma once
#include <type_traits>

#include "tensor.h"

namespace qg {
namespace {

namespace functor {

// Functors compute in compute_t<T>: half and bfloat16 as float.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a + b);
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a - b);
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a * b);
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (static_cast<T>(0.5f) == T(0)) {  // integers: no traps
      if (b == T(0)) return T(0);
      if (static_cast<T>(-1) < T(0) && b == static_cast<T>(-1)) return static_cast<T>(T(0) - a);
    }
    return static_cast<T>(a / b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b || a != a ? a : b;  // NaN wins
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b || a != a ? a : b;
  }
};
struct Equal {
  template <class T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct Relu {
  template <class T>
  T operator()(T x) const {
    return x < T(0) ? T(0) : x;
  }
};
struct Sqrt {
  float operator()(float x) const { return __builtin_sqrtf(x); }
  double operator()(double x) const { return __builtin_sqrt(x); }
};
struct LeakyRelu {
  double alpha;
  explicit LeakyRelu(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    return x < T(0) ? static_cast<T>(alpha * x) : x;
  }
};

}  // namespace functor

// A functor with its attributes.
template <class F>
inline F made(const Floats& attributes) {
  if constexpr (std::is_constructible_v<F, const Floats&>) {
    return F(attributes);
  } else {
    return F{};
  }
}

inline bool fits(const Tensor& x, const Tensor& y) {
  for (int i = 0; i < x.rank; ++i) {
    const int64_t size = y.shape[y.rank - x.rank + i];
    if (x.shape[i] != 1 && x.shape[i] != size) return false;
  }
  return true;
}

// y = f(x...) for operands that are broadcast to y. X is the element type of all operands.
template <class F, class Y, class X, class... Operand>
inline void apply(const Context& c, const F& f, const Tensor& y, const char* wrong, const Operand&... x) {
  if (!(fits(x, y) && ...)) return c.fail(wrong);
  const int64_t n = y.size(), first = c.begin(n), last = c.end(n);
  Y* out = y.as<Y>();
  using T = compute_t<X>;
  if (((x.size() == n) && ...)) {
    for (int64_t i = first; i < last; ++i) {
      out[i] = static_cast<Y>(f(static_cast<T>(x.template as<X>()[i])...));
    }
    return;
  }
  if (first >= last) return;
  Index at(first, y);
  for (int64_t i = first; i < last; ++i, at.advance(y)) {
    out[i] = static_cast<Y>(f(static_cast<T>(x.template as<X>()[at.offset(broadcast_strides(x, y), y.rank)])...));
  }
}

template <class F, class Y, class X>
inline void map(const Context& c, const Tensor& y, const Tensor& x, const Floats& attributes, const char* wrong) {
  apply<F, Y, X>(c, made<F>(attributes), y, wrong, x);
}

template <class F, class Y, class X>
inline void zip(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b, const Floats& attributes, const char* wrong) {
  apply<F, Y, X>(c, made<F>(attributes), y, wrong, a, b);
}

template <class F, class Y, class X>
inline void zip3(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& d, const Floats& attributes, const char* wrong) {
  apply<F, Y, X>(c, made<F>(attributes), y, wrong, a, b, d);
}

// y = f(..f(f(x0, x1), x2)..)
template <class F, class T, int N>
inline void fold(const Context& c, const Tensor& y, const Tensor (&x)[N], const char* wrong) {
  Strides strides[N];
  for (int j = 0; j < N; ++j) {
    if (!fits(x[j], y)) return c.fail(wrong);
    strides[j] = broadcast_strides(x[j], y);
  }
  const int64_t n = y.size(), first = c.begin(n), last = c.end(n);
  if (first >= last) return;
  const F f{};
  Index at(first, y);
  for (int64_t i = first; i < last; ++i, at.advance(y)) {
    compute_t<T> value = x[0].template as<T>()[at.offset(strides[0], y.rank)];
    for (int j = 1; j < N; ++j) {
      value = f(value, static_cast<compute_t<T>>(x[j].template as<T>()[at.offset(strides[j], y.rank)]));
    }
    y.as<T>()[i] = static_cast<T>(value);
  }
}

}  // namespace
}  // namespace qg
