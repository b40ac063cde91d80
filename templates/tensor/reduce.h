// Reductions over axes, and softmax and its kin.
//
// A reducer has an accumulator; every result is accumulated in one fixed order, so it does not
// depend on the number of threads. Floats are summed as double.
#pragma once
#include "elementwise.h"

namespace qg {
namespace {

namespace reducer {

// Integers wrap.
template <class V>
using sum_t = std::conditional_t<std::is_floating_point_v<V>, double, uint64_t>;

template <class V>
struct Sum {
  using Acc = sum_t<V>;
  static Acc first() { return Acc(0); }
  static void add(Acc& a, V v) { a += static_cast<Acc>(v); }
  static void join(Acc& a, const Acc& b) { a += b; }
  static auto result(Acc a, int64_t) {
    if constexpr (std::is_floating_point_v<V>) {
      return a;
    } else {
      return static_cast<V>(a);
    }
  }
};
template <class V>
struct Mean : Sum<V> {
  static auto result(sum_t<V> a, int64_t n) {
    if constexpr (std::is_floating_point_v<V>) {
      return a / static_cast<double>(n);
    } else if constexpr (std::is_signed_v<V>) {
      return static_cast<V>(n ? static_cast<int64_t>(a) / n : 0);
    } else {
      return static_cast<V>(n ? a / static_cast<uint64_t>(n) : 0);
    }
  }
};
template <class V>
struct L1 : Sum<V> {
  static void add(sum_t<V>& a, V v) { a += static_cast<sum_t<V>>(functor::Abs{}(v)); }
};
template <class V>
struct SumSquare : Sum<V> {
  static void add(sum_t<V>& a, V v) { a += static_cast<sum_t<V>>(v) * static_cast<sum_t<V>>(v); }
};
template <class V>
struct LogSum : Sum<double> {
  static void add(double& a, V v) { a += static_cast<double>(v); }
  static double result(double a, int64_t) { return __builtin_log(a); }
};
template <class V>
struct L2 : Sum<double> {
  static void add(double& a, V v) { a += static_cast<double>(v) * static_cast<double>(v); }
  static double result(double a, int64_t) { return __builtin_sqrt(a); }
};
template <class V>
struct Prod : Sum<V> {
  using Acc = sum_t<V>;
  static Acc first() { return Acc(1); }
  static void add(Acc& a, V v) { a *= static_cast<Acc>(v); }
  static void join(Acc& a, const Acc& b) { a *= b; }
};
template <class V, class F, bool kLeast>
struct Extreme {
  using Acc = V;
  static V first() {
    using Limits = std::numeric_limits<V>;
    if constexpr (std::is_floating_point_v<V>) return kLeast ? Limits::infinity() : -Limits::infinity();
    return kLeast ? Limits::max() : Limits::lowest();
  }
  static void add(V& a, V v) { a = F{}(a, v); }
  static void join(V& a, const V& b) { a = F{}(a, b); }
  static V result(V a, int64_t) { return a; }
};
template <class V>
struct Max : Extreme<V, functor::Max, false> {};
template <class V>
struct Min : Extreme<V, functor::Min, true> {};

// log(sum exp(v)): the sum is that of exp(v - most).
template <class V>
struct LogSumExp {
  struct Acc {
    double most, sum;
  };
  static Acc first() { return {-__builtin_inf(), 0}; }
  static void add(Acc& a, V v) { join(a, {static_cast<double>(v), 1}); }
  static void join(Acc& a, const Acc& b) {
    if (b.most == a.most) {
      a.sum += b.sum;
    } else if (b.most > a.most) {
      a = {b.most, b.sum + a.sum * __builtin_exp(a.most - b.most)};
    } else {
      a.sum += b.sum * __builtin_exp(b.most - a.most);
    }
  }
  static double result(const Acc& a, int64_t) { return a.most + __builtin_log(a.sum); }
};

}  // namespace reducer

// Which axes of x are reduced: all if none is named, unless that means none. False: one is out of
// range or named twice.
inline bool reduced_axes(const Tensor& x, const Ints& axes, bool all, bool (&reduced)[kMaxRank]) {
  for (int i = 0; i < kMaxRank; ++i) reduced[i] = axes.n == 0 && all;
  for (int j = 0; j < axes.n; ++j) {
    const int64_t axis = axes[j] < 0 ? axes[j] + x.rank : axes[j];
    if (axis < 0 || axis >= x.rank || reduced[axis]) return false;
    reduced[axis] = true;
  }
  return true;
}

inline void reduce_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& axes, bool all, bool keep, int64_t rank, const char* wrong) {
  bool reduced[kMaxRank];
  const bool good = reduced_axes(x, axes, all, reduced);
  int64_t n = 0;
  for (int i = 0; good && i < x.rank; ++i) {
    if (reduced[i] && !keep) continue;
    if (n < rank) sizes[n] = reduced[i] ? 1 : x.shape[i];
    ++n;
  }
  if (good && n == rank) return;
  c.fail(wrong);
  for (int i = 0; i < rank; ++i) sizes[i] = -1;
}

// The axes of x that are reduced or kept, neighbours as one.
struct Axes {
  int rank = 0;
  int64_t shape[kMaxRank], stride[kMaxRank];
  void append(int64_t size) {
    for (int i = 0; i < rank; ++i) stride[i] *= size;
  }
  int64_t size(int axes) const {
    int64_t n = 1;
    for (int i = 0; i < axes; ++i) n *= shape[i];
    return n;
  }
  // Offset of an element of the first `axes` axes.
  int64_t offset(int64_t element, int axes) const {
    int64_t o = 0;
    for (int i = axes - 1; i >= 0; --i) {
      o += element % shape[i] * stride[i];
      element /= shape[i];
    }
    return o;
  }
};

template <template <class> class Reducer, class T>
inline void reduce(const Context& c, const Tensor& y, const Tensor& x, const Ints& named, bool all, const char* wrong) {
  using V = compute_t<T>;
  using R = Reducer<V>;
  bool reduced[kMaxRank];
  if (!reduced_axes(x, named, all, reduced)) return c.fail(wrong);
  Axes kept, gone;
  bool last_gone = true;
  for (int i = 0, previous = -1; i < x.rank; ++i) {
    if (x.shape[i] == 1) continue;
    Axes& own = reduced[i] ? gone : kept;
    kept.append(x.shape[i]);
    gone.append(x.shape[i]);
    if (previous != (reduced[i] ? 1 : 0)) own.shape[own.rank++] = 1;
    own.shape[own.rank - 1] *= x.shape[i];
    own.stride[own.rank - 1] = 1;
    previous = reduced[i] ? 1 : 0;
    last_gone = reduced[i];
  }
  const int64_t n = y.size(), first = c.begin(n), last = c.end(n), terms = gone.size(gone.rank);
  if (kept.size(kept.rank) != n) return c.fail(wrong);
  const T* from = x.as<T>();
  T* to = y.as<T>();
  if (last_gone) {  // a result is the sum of runs
    constexpr int kLanes = 8;
    const int outer = max(gone.rank - 1, 0);
    const int64_t run = gone.rank ? gone.shape[outer] : 1, runs = terms ? terms / run : 0;
    for (int64_t i = first; i < last; ++i) {
      typename R::Acc acc[kLanes];
      for (auto& a : acc) a = R::first();
      const T* base = from + kept.offset(i, kept.rank);
      for (int64_t r = 0; r < runs; ++r) {
        const T* v = base + gone.offset(r, outer);
        int64_t j = 0;
        for (; j + kLanes <= run; j += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) R::add(acc[lane], static_cast<V>(v[j + lane]));
        }
        for (int lane = 0; j < run; ++j, ++lane) R::add(acc[lane], static_cast<V>(v[j]));
      }
      for (int step = kLanes / 2; step; step /= 2) {
        for (int lane = 0; lane < step; ++lane) R::join(acc[lane], acc[lane + step]);
      }
      to[i] = convert<T>(R::result(acc[0], terms));
    }
    return;
  }
  constexpr int64_t kColumns = 64;  // results side by side
  const int outer = kept.rank - 1;
  const int64_t columns = kept.shape[outer];
  for (int64_t i = first; i < last;) {
    const int64_t column = i % columns, width = min(min(kColumns, columns - column), last - i);
    typename R::Acc acc[kColumns];
    for (int64_t j = 0; j < width; ++j) acc[j] = R::first();
    const T* base = from + kept.offset(i / columns, outer) + column;
    for (int64_t r = 0; r < terms; ++r) {
      const T* v = base + gone.offset(r, gone.rank);
      for (int64_t j = 0; j < width; ++j) R::add(acc[j], static_cast<V>(v[j]));
    }
    for (int64_t j = 0; j < width; ++j) to[i + j] = convert<T>(R::result(acc[j], terms));
    i += width;
  }
}

namespace normalizer {

// y of n elements of x, `stride` apart.
template <class V>
struct Exponentials {
  V most;
  double sum;
  template <class T>
  Exponentials(const T* x, int64_t n, int64_t stride) : most(-std::numeric_limits<V>::infinity()), sum(0) {
    for (int64_t i = 0; i < n; ++i) most = functor::Max{}(most, static_cast<V>(x[i * stride]));
    for (int64_t i = 0; i < n; ++i) {
      sum += static_cast<double>(functor::exp_of(static_cast<V>(x[i * stride]) - most));
    }
  }
};
struct Softmax {
  template <class T>
  static void row(T* y, const T* x, int64_t n, int64_t stride) {
    using V = compute_t<T>;
    const Exponentials<V> e(x, n, stride);
    for (int64_t i = 0; i < n; ++i) {
      const V part = functor::exp_of(static_cast<V>(x[i * stride]) - e.most);
      y[i * stride] = static_cast<T>(part / static_cast<V>(e.sum));
    }
  }
};
struct LogSoftmax {
  template <class T>
  static void row(T* y, const T* x, int64_t n, int64_t stride) {
    using V = compute_t<T>;
    const Exponentials<V> e(x, n, stride);
    const V log = static_cast<V>(__builtin_log(e.sum));
    for (int64_t i = 0; i < n; ++i) {
      y[i * stride] = static_cast<T>(static_cast<V>(x[i * stride]) - e.most - log);
    }
  }
};
// 1 for the first of the largest, 0 for the others.
struct Hardmax {
  template <class T>
  static void row(T* y, const T* x, int64_t n, int64_t stride) {
    using V = compute_t<T>;
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i) {
      if (static_cast<V>(x[i * stride]) > static_cast<V>(x[best * stride])) best = i;
    }
    for (int64_t i = 0; i < n; ++i) y[i * stride] = static_cast<T>(V(i == best ? 1 : 0));
  }
};

}  // namespace normalizer

// Rows along an axis, or, flattened, along all from it on.
template <class Normalizer, class T>
inline void normalize(const Context& c, const Tensor& y, const Tensor& x, int64_t axis, bool flatten) {
  const int at = static_cast<int>(axis);
  const int64_t n = flatten ? x.count(at, x.rank) : x.rank ? x.shape[at] : 1;
  const int64_t stride = flatten ? 1 : x.count(at + 1, x.rank);
  const int64_t rows = x.count(0, at) * stride;
  for (int64_t r = c.begin(rows); r < c.end(rows); ++r) {
    const int64_t first = r / stride * n * stride + r % stride;
    Normalizer::row(y.as<T>() + first, x.as<T>() + first, n, stride);
  }
}

}  // namespace
}  // namespace qg
