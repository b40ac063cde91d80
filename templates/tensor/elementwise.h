// Elementwise kernels of any type: map, zip and zip3 apply a functor to one, two or three operands.
#pragma once
#include <type_traits>
#include <utility>

#include "convert.h"
#include "tensor.h"

namespace qg {
namespace {

namespace functor {

// Functors compute in compute_t of the operands' type: half and bfloat16 as float.

// Integers wrap: they are added and multiplied without a sign.
template <class T>
using wrap_t = std::conditional_t<std::is_integral_v<T>, uint64_t, T>;
template <class T>
constexpr bool kInteger = std::is_integral_v<T>;
template <class T>
constexpr bool kSigned = std::is_signed_v<T>;

#define QG_WRAPPING(Name, op)                                               \
  struct Name {                                                             \
    template <class T>                                                      \
    T operator()(T a, T b) const {                                          \
      return static_cast<T>(static_cast<wrap_t<T>>(a) op static_cast<wrap_t<T>>(b)); \
    }                                                                       \
  };
QG_WRAPPING(Add, +)
QG_WRAPPING(Sub, -)
QG_WRAPPING(Mul, *)
#undef QG_WRAPPING

struct Mean : Add {
  template <class T>
  static T finished(T sum, int n) {
    return sum / static_cast<T>(n);
  }
};

#define QG_OPERATOR(Name, Result, op)    \
  struct Name {                          \
    template <class T>                   \
    Result operator()(T a, T b) const {  \
      return static_cast<Result>(a op b); \
    }                                    \
  };
QG_OPERATOR(Less, bool, <)
QG_OPERATOR(LessOrEqual, bool, <=)
QG_OPERATOR(Greater, bool, >)
QG_OPERATOR(GreaterOrEqual, bool, >=)
QG_OPERATOR(Equal, bool, ==)
QG_OPERATOR(Xor, bool, !=)
QG_OPERATOR(BitwiseAnd, T, &)
QG_OPERATOR(BitwiseOr, T, |)
QG_OPERATOR(BitwiseXor, T, ^)
#undef QG_OPERATOR

struct Not {
  bool operator()(bool x) const { return !x; }
};
struct BitwiseNot {
  template <class T>
  T operator()(T x) const {
    return static_cast<T>(~x);
  }
};
// The shift may be of any size: what is shifted out is gone, and a sign fills from the left.
struct ShiftLeft {
  template <class T>
  T operator()(T x, T by) const {
    if (by < T(0) || static_cast<uint64_t>(by) >= 8 * sizeof(T)) return T(0);
    return static_cast<T>(static_cast<uint64_t>(x) << by);
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T x, T by) const {
    if (by < T(0) || static_cast<uint64_t>(by) >= 8 * sizeof(T)) return static_cast<T>(x < T(0) ? -1 : 0);
    return static_cast<T>(x >> by);
  }
};

// Integers by zero are 0, and the least by -1 wraps: no traps.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>) {
      if (b == T(0)) return T(0);
      if (kSigned<T> && b == static_cast<T>(-1)) return Sub{}(T(0), a);
    }
    return static_cast<T>(a / b);
  }
};
inline float remainder_of(float a, float b) { return __builtin_fmodf(a, b); }
inline double remainder_of(double a, double b) { return __builtin_fmod(a, b); }
// With the sign of a.
struct Fmod {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>) {
      if (b == T(0) || (kSigned<T> && b == static_cast<T>(-1))) return T(0);
      return static_cast<T>(a % b);
    } else {
      return remainder_of(a, b);
    }
  }
};
// With the sign of b.
struct Mod {
  template <class T>
  T operator()(T a, T b) const {
    const T r = Fmod{}(a, b);
    if constexpr (kInteger<T>) {
      return r != T(0) && (r < T(0)) != (b < T(0)) ? static_cast<T>(r + b) : r;
    } else {
      if (r == T(0)) return b < T(0) ? -T(0) : T(0);
      return (r < T(0)) != (b < T(0)) ? r + b : r;
    }
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

struct Abs {
  template <class T>
  T operator()(T x) const {
    if constexpr (kInteger<T>) {
      return x < T(0) ? Sub{}(T(0), x) : x;
    } else {
      return x > T(0) ? x : T(0) - x;
    }
  }
};
struct Neg {
  template <class T>
  T operator()(T x) const {
    if constexpr (kInteger<T>) {
      return Sub{}(T(0), x);
    } else {
      return -x;
    }
  }
};
struct Sign {
  template <class T>
  T operator()(T x) const {
    return x > T(0) ? T(1) : x < T(0) ? static_cast<T>(-1) : x;
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T x) const {
    return T(1) / x;
  }
};
struct IsNaN {
  template <class T>
  bool operator()(T x) const {
    return x != x;
  }
};
struct IsInf {
  bool negative, positive;
  explicit IsInf(const Floats& p) : negative(p[0] != 0), positive(p[1] != 0) {}
  template <class T>
  bool operator()(T x) const {
    return (positive && x == static_cast<T>(__builtin_inf())) || (negative && x == static_cast<T>(-__builtin_inf()));
  }
};

#define QG_FUNCTION(name, function)                                     \
  inline float name(float x) { return __builtin_##function##f(x); }     \
  inline double name(double x) { return __builtin_##function(x); }
QG_FUNCTION(exp_of, exp)
QG_FUNCTION(expm1_of, expm1)
QG_FUNCTION(log1p_of, log1p)
QG_FUNCTION(tanh_of, tanh)
QG_FUNCTION(erfc_of, erfc)
#undef QG_FUNCTION

#define QG_FUNCTION(Name, function)                                      \
  struct Name {                                                          \
    float operator()(float x) const { return __builtin_##function##f(x); } \
    double operator()(double x) const { return __builtin_##function(x); }  \
  };
QG_FUNCTION(Floor, floor)
QG_FUNCTION(Ceil, ceil)
QG_FUNCTION(Round, nearbyint)  // halves to even
QG_FUNCTION(Sqrt, sqrt)
QG_FUNCTION(Exp, exp)
QG_FUNCTION(Log, log)
QG_FUNCTION(Erf, erf)
QG_FUNCTION(Sin, sin)
QG_FUNCTION(Cos, cos)
QG_FUNCTION(Tan, tan)
QG_FUNCTION(Asin, asin)
QG_FUNCTION(Acos, acos)
QG_FUNCTION(Atan, atan)
QG_FUNCTION(Sinh, sinh)
QG_FUNCTION(Cosh, cosh)
QG_FUNCTION(Tanh, tanh)
QG_FUNCTION(Asinh, asinh)
QG_FUNCTION(Acosh, acosh)
QG_FUNCTION(Atanh, atanh)
#undef QG_FUNCTION

struct Relu {
  template <class T>
  T operator()(T x) const {
    return x < T(0) ? T(0) : x;
  }
};
struct LeakyRelu {
  double alpha;
  explicit LeakyRelu(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    return x < T(0) ? static_cast<T>(alpha) * x : x;
  }
};
struct PRelu {
  template <class T>
  T operator()(T x, T slope) const {
    return x < T(0) ? Mul{}(slope, x) : x;
  }
};
struct ThresholdedRelu {
  double alpha;
  explicit ThresholdedRelu(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    return x > static_cast<T>(alpha) ? x : T(0);
  }
};
struct Sigmoid {
  template <class T>
  T operator()(T x) const {
    return T(1) / (T(1) + exp_of(-x));
  }
};
struct HardSigmoid {
  double alpha, beta;
  explicit HardSigmoid(const Floats& p) : alpha(p[0]), beta(p[1]) {}
  template <class T>
  T operator()(T x) const {
    const T y = static_cast<T>(alpha) * x + static_cast<T>(beta);
    return y < T(0) ? T(0) : y > T(1) ? T(1) : y;
  }
};
struct HardSwish {
  template <class T>
  T operator()(T x) const {
    const T y = x / T(6) + T(0.5);
    return x * (y < T(0) ? T(0) : y > T(1) ? T(1) : y);
  }
};
struct Elu {
  double alpha;
  explicit Elu(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    return x < T(0) ? static_cast<T>(alpha) * expm1_of(x) : x;
  }
};
struct Selu {
  double alpha, gamma;
  explicit Selu(const Floats& p) : alpha(p[0]), gamma(p[1]) {}
  template <class T>
  T operator()(T x) const {
    return static_cast<T>(gamma) * (x > T(0) ? x : static_cast<T>(alpha) * expm1_of(x));
  }
};
struct Celu {
  double alpha;
  explicit Celu(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    const T a = static_cast<T>(alpha), low = a * expm1_of(x / a);
    return (x > T(0) ? x : T(0)) + (low >= T(0) ? T(0) : low);
  }
};
struct Softplus {
  template <class T>
  T operator()(T x) const {
    return (x > T(0) ? x : T(0)) + log1p_of(exp_of(x > T(0) ? -x : x));
  }
};
struct Softsign {
  template <class T>
  T operator()(T x) const {
    return x / (T(1) + Abs{}(x));
  }
};
struct Mish {
  template <class T>
  T operator()(T x) const {
    return x * tanh_of(Softplus{}(x));
  }
};
struct Swish {
  double alpha;
  explicit Swish(const Floats& p) : alpha(p[0]) {}
  template <class T>
  T operator()(T x) const {
    return x * Sigmoid{}(static_cast<T>(alpha) * x);
  }
};
struct Gelu {
  template <class T>
  T operator()(T x) const {
    return T(0.5) * x * erfc_of(x * T(-0.70710678118654752440));  // keeps small results accurate
  }
};
struct GeluTanh {
  template <class T>
  T operator()(T x) const {
    return T(0.5) * x * (T(1) + tanh_of(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));
  }
};
struct Shrink {
  double bias, lambda;
  explicit Shrink(const Floats& p) : bias(p[0]), lambda(p[1]) {}
  template <class T>
  T operator()(T x) const {
    if constexpr (kInteger<T>) {
      const double v = static_cast<double>(x);
      return v < -lambda ? truncated<T>(v + bias) : v > lambda ? truncated<T>(v - bias) : T(0);
    } else {
      return x < static_cast<T>(-lambda) ? x + static_cast<T>(bias) : x > static_cast<T>(lambda) ? x - static_cast<T>(bias) : T(0);
    }
  }
};

// In the type of a; integers to the power of integers wrap.
struct Pow {
  template <class A, class B>
  A operator()(A a, B b) const {
    if constexpr (kInteger<A> && kInteger<B>) {
      if (b < B(0)) {
        if (a == A(1)) return A(1);
        return a == static_cast<A>(-1) ? static_cast<A>(b % 2 ? -1 : 1) : A(0);
      }
      uint64_t result = 1, base = static_cast<uint64_t>(a);
      for (uint64_t rest = static_cast<uint64_t>(b); rest; rest >>= 1, base *= base) {
        if (rest & 1) result *= base;
      }
      return static_cast<A>(result);
    } else if constexpr (std::is_same_v<A, float> && (std::is_same_v<B, float> || sizeof(B) <= 2)) {
      return __builtin_powf(a, static_cast<float>(b));
    } else {
      const double r = __builtin_pow(static_cast<double>(a), static_cast<double>(b));
      if constexpr (kInteger<A>) {
        return truncated<A>(r);
      } else {
        return static_cast<A>(r);
      }
    }
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

// Whether x can be broadcast to y.
inline bool fits(const Tensor& x, const Tensor& y) {
  if (x.rank > y.rank) return false;
  for (int i = 0; i < x.rank; ++i) {
    const int64_t size = y.shape[y.rank - x.rank + i];
    if (x.shape[i] != 1 && x.shape[i] != size) return false;
  }
  return true;
}

// The elements [first, last) of y in runs along which operands advance by 0 or 1. Axes that all
// operands run through in one go are one.
template <int N>
struct Runs {
  int rank = 1;
  int64_t shape[kMaxRank] = {1};
  int64_t stride[N][kMaxRank] = {};
  int64_t index[kMaxRank] = {};
  int64_t offset[N] = {};  // of the operands at the run's beginning
  int64_t length = 0;      // of the run

  Runs(const Tensor& y, const Tensor* const* x, int64_t first, int64_t last) : at_(first), last_(last) {
    Strides strides[N];
    for (int j = 0; j < N; ++j) strides[j] = broadcast_strides(*x[j], y);
    for (int i = 0; i < y.rank; ++i) {
      if (y.shape[i] == 1) continue;
      bool joins = true;
      for (int j = 0; j < N; ++j) {
        joins = joins && (stride[j][rank - 1] == strides[j][i] * y.shape[i] || shape[rank - 1] == 1);
      }
      if (!joins) shape[rank++] = 1;
      shape[rank - 1] *= y.shape[i];
      for (int j = 0; j < N; ++j) stride[j][rank - 1] = strides[j][i];
    }
    if (at_ >= last_) return;
    for (int i = rank - 1; i >= 0; --i) {
      index[i] = first % shape[i];
      first /= shape[i];
    }
    place();
  }
  bool more() const { return at_ < last_; }
  int64_t at() const { return at_; }
  int64_t step(int operand) const { return stride[operand][rank - 1]; }
  void next() {
    at_ += length;
    if (at_ >= last_) return;
    index[rank - 1] = 0;
    for (int i = rank - 2; i >= 0 && ++index[i] == shape[i]; --i) index[i] = 0;
    place();
  }

 private:
  void place() {
    length = min(shape[rank - 1] - index[rank - 1], last_ - at_);
    for (int j = 0; j < N; ++j) {
      offset[j] = 0;
      for (int i = 0; i < rank; ++i) offset[j] += index[i] * stride[j][i];
    }
  }
  int64_t at_, last_;
};

template <class... X>
struct Types {};

template <class Y, class... X, class F, int N, size_t... I>
inline void apply_run(Types<X...>, std::index_sequence<I...>, const F& f, Y* y, const Runs<N>& runs, const Tensor* const* x) {
  const int64_t n = runs.length;
  if (((runs.step(I) == 1) && ...)) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<Y>(f(static_cast<compute_t<X>>((x[I]->template as<X>() + runs.offset[I])[i])...));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<Y>(f(static_cast<compute_t<X>>((x[I]->template as<X>() + runs.offset[I])[i * runs.step(I)])...));
    }
  }
}

// y = f(x...) for operands, of the types X, that are broadcast to y.
template <class Y, class... X, class F, class... Operand>
inline void apply(Types<X...> types, const Context& c, const F& f, const Tensor& y, const char* wrong, const Operand&... x) {
  constexpr int N = sizeof...(X);
  static_assert(N == sizeof...(Operand), "a type for every operand");
  if (!(fits(x, y) && ...)) return c.fail(wrong);
  const Tensor* const operands[] = {&x...};
  const int64_t n = y.size();
  for (Runs<N> runs(y, operands, c.begin(n), c.end(n)); runs.more(); runs.next()) {
    apply_run<Y>(types, std::make_index_sequence<N>{}, f, y.as<Y>() + runs.at(), runs, operands);
  }
}

template <class F, class Y, class X>
inline void map(const Context& c, const Tensor& y, const Tensor& x, const Floats& attributes, const char* wrong) {
  apply<Y>(Types<X>{}, c, made<F>(attributes), y, wrong, x);
}

template <class F, class Y, class A, class B>
inline void zip(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b, const Floats& attributes, const char* wrong) {
  apply<Y>(Types<A, B>{}, c, made<F>(attributes), y, wrong, a, b);
}

// y = f(..f(f(x0, x1), x2)..); a mean is divided at the end.
template <class F, class T, int N>
inline void fold(const Context& c, const Tensor& y, const Tensor (&x)[N], const char* wrong) {
  const Tensor* operands[N];
  for (int j = 0; j < N; ++j) {
    if (!fits(x[j], y)) return c.fail(wrong);
    operands[j] = &x[j];
  }
  const F f{};
  const int64_t n = y.size();
  for (Runs<N> runs(y, operands, c.begin(n), c.end(n)); runs.more(); runs.next()) {
    for (int64_t i = 0; i < runs.length; ++i) {
      compute_t<T> value = x[0].template as<T>()[runs.offset[0] + i * runs.step(0)];
      for (int j = 1; j < N; ++j) {
        value = f(value, static_cast<compute_t<T>>(x[j].template as<T>()[runs.offset[j] + i * runs.step(j)]));
      }
      if constexpr (std::is_same_v<F, functor::Mean>) value = F::finished(value, N);
      y.as<T>()[runs.at() + i] = static_cast<T>(value);
    }
  }
}

// Between the bounds of type B, which may be absent; the upper one wins.
template <class T, class B>
inline void clip(const Context& c, const Tensor& y, const Tensor& x, const Tensor& low, const Tensor& high) {
  using V = compute_t<T>;
  const V least = low ? static_cast<V>(compute_t<B>(*low.as<B>())) : V{};
  const V most = high ? static_cast<V>(compute_t<B>(*high.as<B>())) : V{};
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    V v = static_cast<V>(x.as<T>()[i]);
    if (low && v < least) v = least;
    if (high && v > most) v = most;
    y.as<T>()[i] = static_cast<T>(v);
  }
}

}  // namespace
}  // namespace qg
