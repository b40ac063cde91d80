// Kernels that move elements and look at none: a result is a view of its operand, written densely.
#pragma once
#include <type_traits>

#include "tensor.h"

namespace qg {
namespace {

// How the elements of a dense result lie in its operand. Axes are added from the outermost to the
// innermost; those that lie behind each other become one.
struct View {
  int rank = 0;
  int64_t shape[2 * kMaxRank];
  int64_t stride[2 * kMaxRank];
  int64_t offset = 0;

  void add(int64_t size, int64_t step) {
    if (size == 1) return;
    if (rank && stride[rank - 1] == size * step) {
      shape[rank - 1] *= size;
      stride[rank - 1] = step;
      return;
    }
    shape[rank] = size;
    stride[rank++] = step;
  }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

// An axis whose elements lie side by side is not the innermost one: tiles that fit into the cache.
template <class T>
inline void read_tiles(const Context& c, T* y, const T* x, const View& v, int unit) {
  const int last = v.rank - 1;
  int64_t dense[2 * kMaxRank];
  int64_t total = 1;
  for (int i = last; i >= 0; --i) {
    dense[i] = total;
    total *= v.shape[i];
  }
  const int64_t u = v.shape[unit], n = v.shape[last], step = v.stride[last];
  const int64_t tile_n = min(n, 32), tile_u = max(32, 1024 / tile_n);
  const int64_t tiles_n = (n + tile_n - 1) / tile_n, tiles_u = (u + tile_u - 1) / tile_u;
  const int64_t items = total / (u * n) * tiles_u * tiles_n;
  for (int64_t item = c.begin(items); item < c.end(items); ++item) {
    const int64_t b0 = item % tiles_n * tile_n, a0 = item / tiles_n % tiles_u * tile_u;
    int64_t rest = item / tiles_n / tiles_u, from = 0, to = 0;
    for (int i = last - 1; i >= 0; --i) {
      if (i == unit) continue;
      from += rest % v.shape[i] * v.stride[i];
      to += rest % v.shape[i] * dense[i];
      rest /= v.shape[i];
    }
    const int64_t b1 = min(b0 + tile_n, n), a1 = min(a0 + tile_u, u);
    for (int64_t a = a0; a < a1; ++a) {
      for (int64_t b = b0; b < b1; ++b) y[to + a * dense[unit] + b] = x[from + a + b * step];
    }
  }
}

// y, dense, = the view of x.
template <class T>
inline void read_view(const Context& c, T* y, const T* x, View v) {
  const int64_t total = v.size();
  if (total == 0) return;
  if (v.rank == 0) {
    v.shape[0] = v.stride[0] = 1;
    v.rank = 1;
  }
  x += v.offset;
  const int last = v.rank - 1;
  const int64_t n = v.shape[last], step = v.stride[last];
  if (step != 1 && step != 0) {
    for (int i = 0; i < last; ++i) {
      if (v.stride[i] == 1) return read_tiles(c, y, x, v, i);
    }
  }
  int64_t at = c.begin(total), column = at % n, row = at / n, from = 0;
  const int64_t end = c.end(total);
  if (at >= end) return;
  int64_t index[2 * kMaxRank];
  for (int i = last - 1; i >= 0; --i) {
    index[i] = row % v.shape[i];
    row /= v.shape[i];
    from += index[i] * v.stride[i];
  }
  while (at < end) {
    const int64_t count = min(n - column, end - at);
    const T* source = x + from + column * step;
    if (step == 1) {
      std::memcpy(y + at, source, static_cast<size_t>(count) * sizeof(T));
    } else if (step == 0) {
      const T value = *source;
      for (int64_t j = 0; j < count; ++j) y[at + j] = value;
    } else {
      for (int64_t j = 0; j < count; ++j) y[at + j] = source[j * step];
    }
    at += count;
    column = 0;
    for (int i = last - 1; i >= 0; --i) {
      from += v.stride[i];
      if (++index[i] < v.shape[i]) break;
      from -= v.shape[i] * v.stride[i];
      index[i] = 0;
    }
  }
}

// y = x, seen with `shape`, with its axes in the order `perm`.
template <class T>
inline void rearrange(const Context& c, const Tensor& y, const Tensor& x, const Ints& shape, const Ints& perm) {
  int64_t strides[2 * kMaxRank];
  int64_t n = 1;
  for (int i = shape.n - 1; i >= 0; --i) {
    strides[i] = n;
    n *= shape[i];
  }
  View v;
  for (int i = 0; i < perm.n; ++i) v.add(shape[static_cast<int>(perm[i])], strides[perm[i]]);
  read_view(c, y.as<T>(), x.as<T>(), v);
}

template <class T>
inline void expand(const Context& c, const Tensor& y, const Tensor& x, const char* wrong) {
  View v;
  const Strides strides = broadcast_strides(x, y);
  for (int i = 0; i < y.rank; ++i) {
    const int axis = i - y.rank + x.rank;
    if (axis >= 0 && x.shape[axis] != 1 && x.shape[axis] != y.shape[i]) return c.fail(wrong);
    v.add(y.shape[i], strides[i]);
  }
  read_view(c, y.as<T>(), x.as<T>(), v);
}

// Shapes align at their ends; a 1 takes the other's size.
inline void expand_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& shape, const Ints& which, int64_t rank, const char* wrong) {
  for (int i = 0; i < which.n; ++i) {
    const int64_t axis = which[i], mine = axis - rank + x.rank, asked = axis - rank + shape.n;
    const int64_t a = mine >= 0 ? x.shape[mine] : 1, b = asked >= 0 ? shape[static_cast<int>(asked)] : 1;
    sizes[i] = a == 1 ? b : a;
    if ((b != 1 && a != 1 && a != b) || b < 0 || shape.n > rank) {
      sizes[i] = -1;
      c.fail(wrong);
    }
  }
}

template <class T>
inline void tile(const Context& c, const Tensor& y, const Tensor& x) {
  View v;
  const Strides strides = strides_of(x);
  for (int i = 0; i < y.rank; ++i) {
    if (x.shape[i] == 0) return;
    v.add(y.shape[i] / x.shape[i], 0);
    v.add(x.shape[i], strides[i]);
  }
  read_view(c, y.as<T>(), x.as<T>(), v);
}

inline void tile_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& repeats, const char* wrong) {
  for (int i = 0; i < x.rank; ++i) {
    const bool bad = i >= repeats.n || repeats[i] < 0 || __builtin_mul_overflow(x.shape[i], repeats[i], &sizes[i]);
    if (!bad) continue;
    sizes[i] = -1;
    c.fail(wrong);
  }
}

// -- slices ---------------------------------------------------------------------------------------

struct Cut {
  int64_t start, step, size;
};

// What a slice takes of every axis; false if its parameters make no sense.
inline bool cuts_of(const Tensor& x, const Ints& starts, const Ints& ends, const Ints& axes, const Ints& steps, Cut (&cuts)[kMaxRank]) {
  for (int i = 0; i < x.rank; ++i) cuts[i] = {0, 1, x.shape[i]};
  if (starts.n != ends.n || (axes.n && axes.n != starts.n) || (steps.n && steps.n != starts.n)) return false;
  for (int i = 0; i < starts.n; ++i) {
    const int64_t axis = axes.n ? (axes[i] < 0 ? axes[i] + x.rank : axes[i]) : i;
    if (axis < 0 || axis >= x.rank || (steps.n && steps[i] == 0)) return false;
    const int64_t d = x.shape[axis];
    const int64_t step = steps.n ? max(-d - 1, min(steps[i], d + 1)) : 1;
    const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? d : d - 1;
    const int64_t start = max(low, min(starts[i] < 0 ? starts[i] + d : starts[i], high));
    const int64_t end = max(low, min(ends[i] < 0 ? ends[i] + d : ends[i], high));
    const int64_t distance = step > 0 ? end - start : start - end, stride = step > 0 ? step : -step;
    cuts[axis] = {start, step, distance > 0 ? (distance + stride - 1) / stride : 0};
  }
  return true;
}

inline void slice_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& starts, const Ints& ends, const Ints& axes, const Ints& steps, const Ints& which, const char* wrong) {
  Cut cuts[kMaxRank];
  const bool good = cuts_of(x, starts, ends, axes, steps, cuts);
  if (!good) c.fail(wrong);
  for (int i = 0; i < which.n; ++i) sizes[i] = good ? cuts[which[i]].size : -1;
}

template <class T>
inline void slice(const Context& c, const Tensor& y, const Tensor& x, const Ints& starts, const Ints& ends, const Ints& axes, const Ints& steps, const char* wrong) {
  Cut cuts[kMaxRank];
  if (!cuts_of(x, starts, ends, axes, steps, cuts)) return c.fail(wrong);
  const Strides strides = strides_of(x);
  View v;
  for (int i = 0; i < y.rank; ++i) {
    if (cuts[i].size != y.shape[i]) return c.fail(wrong);
    v.offset += cuts[i].start * strides[i];
    v.add(cuts[i].size, cuts[i].step * strides[i]);
  }
  read_view(c, y.as<T>(), x.as<T>(), v);
}

// -- joining and cutting along an axis ------------------------------------------------------------

// Copies this thread's share of `outer` pieces of `run` bytes between rows that lie `to_row` and
// `from_row` bytes apart.
inline void copy_rows(const Context& c, char* to, int64_t to_row, const char* from, int64_t from_row, int64_t outer, int64_t run) {
  const int64_t total = outer * run, lines = (total + 63) / 64;
  const int64_t last = min(64 * c.end(lines), total);
  for (int64_t at = 64 * c.begin(lines); at < last;) {
    const int64_t row = at / run, skip = at % run, count = min(run - skip, last - at);
    std::memcpy(to + row * to_row + skip, from + row * from_row + skip, static_cast<size_t>(count));
    at += count;
  }
}

inline bool same_but(const Tensor& a, const Tensor& b, int64_t axis) {
  for (int i = 0; i < a.rank; ++i) {
    if (i != axis && a.shape[i] != b.shape[i]) return false;
  }
  return a.rank == b.rank;
}

template <int N>
inline void concat(const Context& c, const Tensor& y, const Tensor (&x)[N], int64_t axis, int64_t bytes, const char* wrong) {
  const int a = static_cast<int>(axis);
  int64_t all = 0;
  for (const Tensor& part : x) {
    if (!same_but(part, y, axis)) return c.fail(wrong);
    all += part.shape[a];
  }
  if (all != y.shape[a]) return c.fail(wrong);
  const int64_t outer = y.count(0, a), inner = y.count(a + 1, y.rank) * bytes;
  char* to = y.as<char>();
  for (const Tensor& part : x) {
    const int64_t run = part.shape[a] * inner;
    copy_rows(c, to, all * inner, static_cast<const char*>(part.data), run, outer, run);
    to += run;
  }
}

// The results lie behind each other along the axis. `skipped` has the sizes of those that nobody
// wants, which have no axes.
template <int N>
inline void split(const Context& c, const Tensor (&y)[N], const Tensor& x, int64_t axis, int64_t bytes, const Ints& skipped, const char* wrong) {
  const int a = static_cast<int>(axis);
  int64_t sizes[N], all = 0;
  for (int i = 0; i < N; ++i) {
    const Tensor& part = y[i];
    sizes[i] = part.rank ? part.shape[a] : skipped[i];
    all += sizes[i];
    if (part.rank && !same_but(part, x, axis)) return c.fail(wrong);
  }
  if (all != x.shape[a]) return c.fail(wrong);
  const int64_t outer = x.count(0, a), inner = x.count(a + 1, x.rank) * bytes;
  const char* from = x.as<char>();
  for (int i = 0; i < N; ++i) {
    const int64_t run = sizes[i] * inner;
    if (y[i].rank) copy_rows(c, static_cast<char*>(y[i].data), run, from, all * inner, outer, run);
    from += run;
  }
}

template <class I>
inline void split_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Tensor& parts, int64_t axis, int64_t n, const char* wrong) {
  int64_t all = 0;
  bool good = parts.size() == n;
  for (int64_t i = 0; i < n; ++i) {
    sizes[i] = good ? static_cast<int64_t>(parts.as<I>()[i]) : -1;
    good = good && sizes[i] >= 0 && sizes[i] <= x.shape[axis];
    all += sizes[i];
  }
  if (good && all == x.shape[axis]) return;
  c.fail(wrong);
  for (int64_t i = 0; i < n; ++i) sizes[i] = -1;
}

// -- padding --------------------------------------------------------------------------------------

enum class Padding { kConstant, kEdge, kReflect, kWrap };

// Where the element `i` of a padded axis of d > 0 elements comes from.
inline int64_t padded_index(Padding mode, int64_t i, int64_t d) {
  if (mode == Padding::kWrap) return mod(i, d);
  if (mode == Padding::kReflect && d > 1) {
    i = mod(i, 2 * d - 2);
    return i < d ? i : 2 * d - 2 - i;
  }
  return max(0, min(i, d - 1));
}

struct Pads {
  int64_t before[kMaxRank], after[kMaxRank];
};

inline bool pads_of(const Tensor& x, const Ints& pads, const Ints& axes, Pads& result) {
  result = {};
  const int n = axes.n ? axes.n : x.rank;
  if (pads.n != 2 * n) return false;
  for (int i = 0; i < n; ++i) {
    const int64_t axis = axes.n ? (axes[i] < 0 ? axes[i] + x.rank : axes[i]) : i;
    if (axis < 0 || axis >= x.rank) return false;
    result.before[axis] = pads[i];
    result.after[axis] = pads[n + i];
    constexpr int64_t most = int64_t(1) << 48;
    if (pads[i] < -most || pads[i] > most || pads[n + i] < -most || pads[n + i] > most) return false;
  }
  return true;
}

inline void pad_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& pads, const Ints& axes, const Ints& which, const char* wrong) {
  Pads p;
  bool good = pads_of(x, pads, axes, p);
  for (int i = 0; i < which.n; ++i) {
    const int64_t axis = which[i];
    sizes[i] = good ? p.before[axis] + x.shape[axis] + p.after[axis] : -1;
    good = good && sizes[i] >= 0;
  }
  if (!good) c.fail(wrong);
}

template <class T>
inline void pad(const Context& c, const Tensor& y, const Tensor& x, const Tensor& value, Padding mode, const Ints& pads, const Ints& axes, const char* wrong) {
  Pads p;
  if (!pads_of(x, pads, axes, p)) return c.fail(wrong);
  const int64_t total = y.size();
  for (int i = 0; i < y.rank; ++i) {
    if (y.shape[i] != p.before[i] + x.shape[i] + p.after[i]) return c.fail(wrong);
    if (total && x.shape[i] == 0 && mode != Padding::kConstant) return c.fail(wrong);
  }
  if (total == 0) return;
  const T blank = value ? *value.as<T>() : T{};
  if (y.rank == 0) return copy_tensor(c, y, x, sizeof(T));
  const int last = y.rank - 1;
  const int64_t n = y.shape[last], d = x.shape[last], before = p.before[last];
  const int64_t rows = total / n;
  const int64_t middle = max(0, min(before, n)), behind = max(middle, min(before + d, n));
  const Strides strides = strides_of(x);
  Tensor outer = y;
  outer.rank = last;
  const int64_t first = c.begin(rows), end = c.end(rows);
  Index at(first, outer);
  for (int64_t row = first; row < end; ++row, at.advance(outer)) {
    int64_t from = 0;
    bool inside = true;
    for (int i = 0; i < last; ++i) {
      int64_t k = at.v[i] - p.before[i];
      if (mode == Padding::kConstant) {
        inside = inside && k >= 0 && k < x.shape[i];
      } else {
        k = padded_index(mode, k, x.shape[i]);
      }
      from += k * strides[i];
    }
    T* out = y.as<T>() + row * n;
    if (!inside) {
      for (int64_t j = 0; j < n; ++j) out[j] = blank;
      continue;
    }
    const T* in = x.as<T>() + from;
    if (mode == Padding::kConstant) {
      for (int64_t j = 0; j < middle; ++j) out[j] = blank;
      for (int64_t j = behind; j < n; ++j) out[j] = blank;
    } else {
      for (int64_t j = 0; j < middle; ++j) out[j] = in[padded_index(mode, j - before, d)];
      for (int64_t j = behind; j < n; ++j) out[j] = in[padded_index(mode, j - before, d)];
    }
    if (behind > middle) {
      std::memcpy(out + middle, in + (middle - before), static_cast<size_t>(behind - middle) * sizeof(T));
    }
  }
}

// -- others ---------------------------------------------------------------------------------------

template <class T>
inline void where(const Context& c, const Tensor& y, const Tensor& condition, const Tensor& a, const Tensor& b, const char* wrong) {
  const Tensor* operands[] = {&condition, &a, &b};
  for (const Tensor* t : operands) {
    for (int i = 0; i < t->rank; ++i) {
      if (t->shape[i] != 1 && t->shape[i] != y.shape[y.rank - t->rank + i]) return c.fail(wrong);
    }
  }
  const int64_t total = y.size();
  if (total == 0) return;
  const uint8_t* which = condition.as<uint8_t>();
  const T *x0 = a.as<T>(), *x1 = b.as<T>();
  T* out = y.as<T>();
  const int64_t first = c.begin(total), end = c.end(total);
  if (condition.size() == total && a.size() == total && b.size() == total) {
    for (int64_t i = first; i < end; ++i) out[i] = which[i] ? x0[i] : x1[i];
    return;
  }
  if (first >= end) return;
  if (y.rank == 0) {
    *out = *which ? *x0 : *x1;
    return;
  }
  const Strides sc = broadcast_strides(condition, y), sa = broadcast_strides(a, y), sb = broadcast_strides(b, y);
  const int last = y.rank - 1;
  const int64_t n = y.shape[last], s0 = sc[last], s1 = sa[last], s2 = sb[last];
  Tensor outer = y;
  outer.rank = last;
  Index at(first / n, outer);
  for (int64_t i = first, column = first % n; i < end; column = 0, at.advance(outer)) {
    const int64_t count = min(n - column, end - i);
    const uint8_t* w = which + at.offset(sc, last) + column * s0;
    const T* p = x0 + at.offset(sa, last) + column * s1;
    const T* q = x1 + at.offset(sb, last) + column * s2;
    for (int64_t j = 0; j < count; ++j) out[i + j] = w[j * s0] ? p[j * s1] : q[j * s2];
    i += count;
  }
}

// The upper or lower triangle of the matrices of the last two axes; the rest is 0.
template <class T>
inline void triangle(const Context& c, const Tensor& y, const Tensor& x, const Ints& k, bool upper) {
  const int64_t n = y.shape[y.rank - 1], m = y.shape[y.rank - 2], rows = y.count(0, y.rank - 1);
  const int64_t diagonal = k.n ? max(-m, min(k[0], n)) : 0;
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const int64_t edge = max(0, min(row % m + diagonal + (upper ? 0 : 1), n));
    const T* in = x.as<T>() + row * n;
    T* out = y.as<T>() + row * n;
    for (int64_t j = 0; j < edge; ++j) out[j] = upper ? T{} : in[j];
    for (int64_t j = edge; j < n; ++j) out[j] = upper ? in[j] : T{};
  }
}

// The first `lengths` steps of every sequence in reverse.
template <class T>
inline void reverse_sequence(const Context& c, const Tensor& y, const Tensor& x, const Tensor& lengths, int64_t batch_axis, int64_t time_axis, const char* wrong) {
  const int64_t rows = x.shape[0] * x.shape[1], inner = x.count(2, x.rank), steps = x.shape[time_axis];
  if (lengths.size() != x.shape[batch_axis]) return c.fail(wrong);
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const int64_t at[2] = {row / x.shape[1], row % x.shape[1]};
    int64_t length = lengths.as<int64_t>()[at[batch_axis]];
    if (length < 0 || length > steps) {
      c.fail(wrong);
      length = 0;
    }
    int64_t from[2] = {at[0], at[1]};
    if (at[time_axis] < length) from[time_axis] = length - 1 - at[time_axis];
    std::memcpy(y.as<T>() + row * inner, x.as<T>() + (from[0] * x.shape[1] + from[1]) * inner, static_cast<size_t>(inner) * sizeof(T));
  }
}

template <class T>
inline void range(const Context& c, const Tensor& y, const Tensor& start, const Tensor& delta) {
  // numbers with a fraction in double: the product is rounded once
  using Wide = std::conditional_t<static_cast<compute_t<T>>(0.5f) == compute_t<T>(0), int64_t, double>;
  const Wide a = static_cast<Wide>(static_cast<compute_t<T>>(*start.as<T>()));
  const Wide d = static_cast<Wide>(static_cast<compute_t<T>>(*delta.as<T>()));
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    y.as<T>()[i] = static_cast<T>(static_cast<compute_t<T>>(a + static_cast<Wide>(i) * d));
  }
}

template <class T>
inline void range_sizes(const Context& c, int64_t* sizes, const Tensor& start, const Tensor& limit, const Tensor& delta, const char* wrong) {
  const compute_t<T> a = *start.as<T>(), b = *limit.as<T>(), d = *delta.as<T>();
  sizes[0] = -1;
  if constexpr (static_cast<compute_t<T>>(0.5f) == compute_t<T>(0)) {
    if (d == 0) return c.fail(wrong);
    const bool up = d > 0;
    if (up ? a >= b : a <= b) {
      sizes[0] = 0;
      return;
    }
    const uint64_t low = static_cast<uint64_t>(up ? a : b), high = static_cast<uint64_t>(up ? b : a);
    const uint64_t step = up ? static_cast<uint64_t>(d) : 0 - static_cast<uint64_t>(d);
    sizes[0] = static_cast<int64_t>((high - low - 1) / step + 1);
  } else {
    const double n = __builtin_ceil((static_cast<double>(b) - static_cast<double>(a)) / static_cast<double>(d));
    if (!(d != 0 && n < 1e15)) return c.fail(wrong);
    sizes[0] = n > 0 ? static_cast<int64_t>(n) : 0;
  }
  if (sizes[0] < 0) c.fail(wrong);
}

// Ones at [i, i + k].
template <class T>
inline void eye(const Context& c, const Tensor& y, int64_t k) {
  for (int64_t i = c.begin(y.shape[0]); i < c.end(y.shape[0]); ++i) {
    T* row = y.as<T>() + i * y.shape[1];
    for (int64_t j = 0; j < y.shape[1]; ++j) row[j] = static_cast<T>(static_cast<compute_t<T>>(0));
    if (i + k >= 0 && i + k < y.shape[1]) row[i + k] = static_cast<T>(static_cast<compute_t<T>>(1));
  }
}

}  // namespace
}  // namespace qg
