// Kernels that read or write at indices that are data. An index below 0 counts from the end; one that
// is out of range is reported, and its element is 0 or left as it is.
#pragma once
#include "tensor.h"

namespace qg {
namespace {

// An index of an axis of n elements, counted from the front; -1 (and a report) if it is out of range.
inline int64_t checked(const Context& c, int64_t index, int64_t n, const char* wrong) {
  const int64_t i = index < 0 ? index + n : index;
  if (i >= 0 && i < n) return i;
  c.fail(wrong);
  return -1;
}

template <class T, class I>
inline void gather(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, int64_t axis, const char* wrong) {
  const int a = static_cast<int>(axis);
  const int64_t inner = x.count(a + 1, x.rank), n = indices.size(), d = x.shape[a];
  const int64_t rows = x.count(0, a) * n;
  const T* in = x.as<T>();
  T* out = y.as<T>();
  if (rows < 4 * c.threads) {  // few long rows: every thread takes a part of each
    const int64_t first = c.begin(inner), count = c.end(inner) - first;
    for (int64_t row = 0; row < rows && count; ++row) {
      const int64_t i = checked(c, static_cast<int64_t>(indices.as<I>()[row % n]), d, wrong);
      T* to = out + row * inner + first;
      if (i < 0) {
        std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
      } else {
        std::memcpy(to, in + (row / n * d + i) * inner + first, static_cast<size_t>(count) * sizeof(T));
      }
    }
    return;
  }
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const int64_t i = checked(c, static_cast<int64_t>(indices.as<I>()[row % n]), d, wrong);
    T* to = out + row * inner;
    if (inner == 1) {
      *to = i < 0 ? T{} : in[row / n * d + i];
    } else if (i < 0) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(inner) * sizeof(T));
    } else {
      std::memcpy(to, in + (row / n * d + i) * inner, static_cast<size_t>(inner) * sizeof(T));
    }
  }
}

template <class T, class I>
inline void gather_elements(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, int64_t axis, const char* wrong) {
  for (int i = 0; i < y.rank; ++i) {
    if (i != axis && indices.shape[i] > x.shape[i]) return c.fail(wrong);
  }
  const int64_t total = y.size(), first = c.begin(total), end = c.end(total);
  if (first >= end) return;
  Strides strides = strides_of(x);
  const int64_t step = strides[static_cast<int>(axis)], d = x.shape[axis];
  strides.v[axis] = 0;
  const int last = y.rank - 1;
  const int64_t n = y.shape[last], unit = strides[last];
  Tensor outer = y;
  outer.rank = last;
  Index at(first / n, outer);
  for (int64_t i = first, column = first % n; i < end; column = 0, at.advance(outer)) {
    const int64_t count = min(n - column, end - i);
    const T* in = x.as<T>() + at.offset(strides, last) + column * unit;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t k = checked(c, static_cast<int64_t>(indices.as<I>()[i + j]), d, wrong);
      y.as<T>()[i + j] = k < 0 ? T{} : in[j * unit + k * step];
    }
    i += count;
  }
}

// The offset of the k indices at `tuple` into axes [axis, axis + k) of x; -1 if one is out of range.
inline int64_t tuple_offset(const Context& c, const Tensor& x, const Strides& strides, int axis, const int64_t* tuple, int64_t k, const char* wrong) {
  int64_t offset = 0;
  for (int j = 0; j < k; ++j) {
    const int64_t i = checked(c, tuple[j], x.shape[axis + j], wrong);
    if (i < 0) return -1;
    offset += i * strides[axis + j];
  }
  return offset;
}

template <class T>
inline void gather_nd(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, int64_t batch_axes, const char* wrong) {
  const int b = static_cast<int>(batch_axes);
  const int64_t k = indices.shape[indices.rank - 1];
  for (int i = 0; i < b; ++i) {
    if (indices.shape[i] != x.shape[i]) return c.fail(wrong);
  }
  const int64_t batches = x.count(0, b), rows = indices.count(0, indices.rank - 1);
  const int64_t inner = x.count(b + static_cast<int>(k), x.rank), batch = x.count(b, x.rank);
  const Strides strides = strides_of(x);
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const int64_t offset = tuple_offset(c, x, strides, b, indices.as<int64_t>() + row * k, k, wrong);
    T* to = y.as<T>() + row * inner;
    if (offset < 0) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(inner) * sizeof(T));
    } else {
      const int64_t from = row / (rows / batches) * batch + offset;
      std::memcpy(to, x.as<T>() + from, static_cast<size_t>(inner) * sizeof(T));
    }
  }
}

// -- scattering -----------------------------------------------------------------------------------

// What a new value makes of the old one.
namespace merge {
struct Replace {
  template <class T>
  T operator()(T, T b) const {
    return b;
  }
};
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<compute_t<T>>(a) + static_cast<compute_t<T>>(b));
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<compute_t<T>>(a) * static_cast<compute_t<T>>(b));
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    const compute_t<T> p = a, q = b;
    return p > q || p != p ? a : b;  // NaN wins
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    const compute_t<T> p = a, q = b;
    return p < q || p != p ? a : b;
  }
};
}  // namespace merge

// Lines along the axis are independent of each other; within one, later updates come later.
template <class F, class T, class I>
inline void scatter_elements(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, const Tensor& updates, int64_t axis, const char* wrong) {
  copy_tensor(c, y, x, sizeof(T));
  c.wait();
  for (int i = 0; i < x.rank; ++i) {
    if (indices.shape[i] != updates.shape[i]) return c.fail(wrong);
    if (i != axis && indices.shape[i] > x.shape[i]) return c.fail(wrong);
  }
  if (indices.size() == 0) return;
  const int64_t n = indices.shape[axis], lines = indices.size() / n;
  const Strides from = strides_of(indices), to = strides_of(y);
  Tensor outer = indices;
  outer.shape[axis] = 1;
  const int64_t first = c.begin(lines), end = c.end(lines);
  Index at(first, outer);
  for (int64_t line = first; line < end; ++line, at.advance(outer)) {
    const int64_t source = at.offset(from, outer.rank);
    T* target = y.as<T>() + at.offset(to, outer.rank);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t s = source + k * from[static_cast<int>(axis)];
      const int64_t i = checked(c, static_cast<int64_t>(indices.as<I>()[s]), x.shape[axis], wrong);
      if (i < 0) continue;
      T& element = target[i * to[static_cast<int>(axis)]];
      element = F{}(element, updates.as<T>()[s]);
    }
  }
}

// Indices may name a place twice: every thread does its part of all slices, in their order.
template <class F, class T>
inline void scatter_nd(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, const Tensor& updates, const char* wrong) {
  copy_tensor(c, y, x, sizeof(T));
  c.wait();
  const int64_t k = indices.shape[indices.rank - 1], rows = indices.count(0, indices.rank - 1);
  const int64_t inner = x.count(static_cast<int>(k), x.rank);
  if (updates.size() != rows * inner) return c.fail(wrong);
  const Strides strides = strides_of(x);
  const int64_t first = c.begin(inner), end = c.end(inner);
  if (first >= end) return;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t offset = tuple_offset(c, x, strides, 0, indices.as<int64_t>() + row * k, k, wrong);
    if (offset < 0) continue;
    T* to = y.as<T>() + offset;
    const T* from = updates.as<T>() + row * inner;
    for (int64_t j = first; j < end; ++j) to[j] = F{}(to[j], from[j]);
  }
}

// The updates of every batch go to the places from its index on; `circular` ones begin anew at the end.
inline void tensor_scatter(const Context& c, const Tensor& y, const Tensor& x, const Tensor& updates, const Tensor& indices, int64_t axis, bool circular, int64_t bytes, const char* wrong) {
  copy_tensor(c, y, x, bytes);
  c.wait();
  const int a = static_cast<int>(axis);
  const int64_t length = x.shape[a], steps = updates.shape[a], outer = x.count(0, a);
  const int64_t inner = x.count(a + 1, x.rank) * bytes, rows = outer * steps, heads = x.count(1, a);
  if (steps > length || updates.size() * bytes != rows * inner) return c.fail(wrong);
  if (indices && indices.size() != x.shape[0]) return c.fail(wrong);
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    int64_t first = indices ? indices.as<int64_t>()[row / steps / heads] : 0;
    if (first < 0 || (circular ? false : first > length - steps)) {
      c.fail(wrong);
      continue;
    }
    if (circular) first %= length;
    const int64_t at = (first + row % steps) % length;
    std::memcpy(y.as<char>() + (row / steps * length + at) * inner, updates.as<char>() + row * inner, static_cast<size_t>(inner));
  }
}

// -- what is not 0, or chosen by a condition ------------------------------------------------------

template <class T>
inline bool is_set(const T& x) {
  return static_cast<compute_t<T>>(x) != compute_t<T>(0);
}

template <class T>
inline int64_t count_set(const Tensor& x, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += is_set(x.as<T>()[i]);
  return count;
}

template <class T>
inline void nonzero_sizes(const Context&, int64_t* sizes, const Tensor& x) {
  sizes[0] = count_set<T>(x, x.size());
}

template <class T>
inline void nonzero(const Context& c, const Tensor& y, const Tensor& x) {
  const int64_t total = x.size(), first = c.begin(total), end = c.end(total), n = y.shape[1];
  int64_t place = count_set<T>(x, first);
  Index at(first, x);
  for (int64_t i = first; i < end; ++i, at.advance(x)) {
    if (!is_set(x.as<T>()[i])) continue;
    for (int a = 0; a < y.shape[0]; ++a) y.as<int64_t>()[a * n + place] = x.rank ? at.v[a] : 0;
    ++place;
  }
}

// axis < 0: of all elements in order.
inline void compress_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Tensor& condition, int64_t axis, const char* wrong) {
  const int64_t d = axis < 0 ? x.size() : x.shape[axis];
  sizes[0] = count_set<bool>(condition, condition.size());
  if (condition.size() <= d) return;
  sizes[0] = -1;
  c.fail(wrong);
}

inline void compress(const Context& c, const Tensor& y, const Tensor& x, const Tensor& condition, int64_t axis, int64_t bytes) {
  const int a = static_cast<int>(axis);
  const int64_t d = axis < 0 ? x.size() : x.shape[a], outer = axis < 0 ? 1 : x.count(0, a);
  const int64_t inner = (axis < 0 ? 1 : x.count(a + 1, x.rank)) * bytes;
  const int64_t kept = y.shape[axis < 0 ? 0 : a];
  // every thread takes a part of the condition and counts what the others keep before it
  const int64_t n = condition.size(), first = c.begin(n), end = c.end(n);
  int64_t place = count_set<bool>(condition, first);
  for (int64_t i = first; i < end; ++i) {
    if (!condition.as<bool>()[i]) continue;
    for (int64_t o = 0; o < outer; ++o) {
      std::memcpy(y.as<char>() + (o * kept + place) * inner, x.as<char>() + (o * d + i) * inner, static_cast<size_t>(inner));
    }
    ++place;
  }
}

// -- one of many ----------------------------------------------------------------------------------

// An index that may be stored as a number with a fraction; -1 if it is none of n.
template <class I>
inline int64_t class_of(I index, int64_t n) {
  const compute_t<I> value = static_cast<compute_t<I>>(index);
  if (!(value >= static_cast<compute_t<I>>(-n) && value < static_cast<compute_t<I>>(n))) return -1;
  const int64_t i = static_cast<int64_t>(value);
  return static_cast<compute_t<I>>(i) == value ? (i < 0 ? i + n : i) : -1;
}

template <class T, class I>
inline void one_hot(const Context& c, const Tensor& y, const Tensor& indices, const Tensor& values, int64_t axis) {
  const int a = static_cast<int>(axis);
  const int64_t n = y.shape[a], inner = y.count(a + 1, y.rank), rows = y.count(0, a) * n;
  const T off = values.as<T>()[0], on = values.as<T>()[1];
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const I* in = indices.as<I>() + row / n * inner;
    T* out = y.as<T>() + row * inner;
    for (int64_t j = 0; j < inner; ++j) out[j] = class_of(in[j], n) == row % n ? on : off;
  }
}

template <class D>
inline void one_hot_sizes(const Context& c, int64_t* sizes, const Tensor& depth, const char* wrong) {
  const compute_t<D> n = static_cast<compute_t<D>>(*depth.as<D>());
  const bool good = n >= compute_t<D>(0) && static_cast<double>(n) < 1e15;
  sizes[0] = good ? static_cast<int64_t>(n) : -1;
  if (!good) c.fail(wrong);
}

// x at indices into a result of the size that the pooling had, which lies in the corner of y.
template <class T>
inline void max_unpool(const Context& c, const Tensor& y, const Tensor& x, const Tensor& indices, const Ints& kernel, const Ints& pads, const Ints& strides, const char* wrong) {
  const int64_t total = y.size(), first = c.begin(total), end = c.end(total);
  if (end > first) std::memset(static_cast<void*>(y.as<T>() + first), 0, static_cast<size_t>(end - first) * sizeof(T));
  c.wait();
  if (c.thread != 0) return;  // indices may name a place twice: the last one counts
  Tensor pooled = x;
  bool good = indices.size() == x.size();
  for (int i = 0; i < x.rank; ++i) {
    if (i >= 2) pooled.shape[i] = (x.shape[i] - 1) * strides[i - 2] - pads[i - 2] - pads[kernel.n + i - 2] + kernel[i - 2];
    good = good && pooled.shape[i] <= y.shape[i];
  }
  if (!good) return c.fail(wrong);
  const int64_t n = pooled.size();
  const Strides to = strides_of(y);
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t k = checked(c, indices.as<int64_t>()[i], n, wrong);
    if (k >= 0) y.as<T>()[Index(k, pooled).offset(to, y.rank)] = x.as<T>()[i];
  }
}

inline void max_unpool_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& asked, const char* wrong) {
  for (int i = 0; i < x.rank; ++i) {
    sizes[i] = asked.n == x.rank ? asked[i] : -1;
    if (sizes[i] < 0) c.fail(wrong);
  }
}

// Overlapping columns are summed up: every element collects what the windows have of it.
template <class T>
inline void col2im(const Context& c, const Tensor& y, const Tensor& x, const Ints& block, const Ints& dilations, const Ints& pads, const Ints& strides, const char* wrong) {
  const int n = block.n;
  Tensor window = {}, columns = {}, image = y;
  window.rank = columns.rank = n;
  for (int i = 0; i < n; ++i) {
    window.shape[i] = block[i];
    columns.shape[i] = floordiv(y.shape[2 + i] + pads[i] + pads[n + i] - dilations[i] * (block[i] - 1) - 1, strides[i]) + 1;
    if (columns.shape[i] < 0 || block[i] < 1) return c.fail(wrong);
  }
  const int64_t taps = window.size(), l = columns.size();
  if (x.shape[1] != y.shape[1] * taps || x.shape[2] != l) return c.fail(wrong);
  const Strides at_column = strides_of(columns);
  const int64_t total = y.size(), first = c.begin(total), end = c.end(total), pixels = y.count(2, y.rank);
  Index at(first, image);
  for (int64_t i = first; i < end; ++i, at.advance(image)) {
    compute_t<T> sum = 0;
    Index tap(0, window);
    for (int64_t t = 0; t < taps; ++t, tap.advance(window)) {
      int64_t column = 0;
      for (int k = 0; k < n && column >= 0; ++k) {
        const int64_t p = at.v[2 + k] + pads[k] - tap.v[k] * dilations[k];
        const bool inside = p >= 0 && p % strides[k] == 0 && p / strides[k] < columns.shape[k];
        column = inside ? column + p / strides[k] * at_column[k] : -1;
      }
      if (column >= 0) sum += static_cast<compute_t<T>>(x.as<T>()[(i / pixels * taps + t) * l + column]);
    }
    y.as<T>()[i] = static_cast<T>(sum);
  }
}

// [N, C * elements of the block, L] -> [N, C, image]
inline void col2im_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& image, const Ints& block, const Ints& which, const char* wrong) {
  int64_t taps = 1;
  for (int i = 0; i < block.n; ++i) taps *= block[i];
  const bool good = taps > 0 && image.n == block.n;
  if (!good) c.fail(wrong);
  for (int i = 0; i < which.n; ++i) {
    const int axis = static_cast<int>(which[i]);
    sizes[i] = !good ? -1 : axis == 1 ? x.shape[1] / taps : image[axis - 2];
  }
}

}  // namespace
}  // namespace qg
