// Kernels that order elements or accumulate along an axis: TopK, ArgMax, Unique, NonMaxSuppression,
// CumSum.
#pragma once
#include "tensor.h"

namespace qg {
namespace {

// Numbers in one order, NaN the largest.
template <class T>
inline bool less(T a, T b) {
  return a < b || (a == a && b != b);
}

// A heap of numbers that lie `step` apart; the root is what comes last in the order `before`.
template <class Before>
inline void sift(int64_t* heap, int64_t step, int64_t root, int64_t n, const Before& before) {
  const int64_t moved = heap[root * step];
  for (int64_t child = 2 * root + 1; child < n; child = 2 * root + 1) {
    if (child + 1 < n && before(heap[child * step], heap[(child + 1) * step])) ++child;
    if (!before(moved, heap[child * step])) break;
    heap[root * step] = heap[child * step];
    root = child;
  }
  heap[root * step] = moved;
}

template <class Before>
inline void heapify(int64_t* heap, int64_t step, int64_t n, const Before& before) {
  for (int64_t i = n / 2 - 1; i >= 0; --i) sift(heap, step, i, n, before);
}

template <class Before>
inline void sort_heap(int64_t* heap, int64_t step, int64_t n, const Before& before) {
  for (int64_t i = n - 1; i > 0; --i) {
    const int64_t last = heap[0];
    heap[0] = heap[i * step];
    heap[i * step] = last;
    sift(heap, step, 0, i, before);
  }
}

// The first k of each line of an axis, the best first; of equal ones the first. `indices` is the heap.
template <class T>
inline void top_k(const Context& c, const Tensor& values, const Tensor& indices, const Tensor& x, int64_t axis, bool largest, const char* wrong) {
  const int a = static_cast<int>(axis);
  const int64_t n = x.shape[a], k = values.shape[a], inner = x.count(a + 1, x.rank);
  const int64_t lines = x.count(0, a) * inner;
  if (k > n) return c.fail(wrong);
  if (k == 0) return;
  for (int64_t line = c.begin(lines); line < c.end(lines); ++line) {
    const T* in = x.as<T>() + line / inner * n * inner + line % inner;
    const int64_t to = line / inner * k * inner + line % inner;
    int64_t* heap = indices.as<int64_t>() + to;
    const auto before = [&](int64_t i, int64_t j) {
      const compute_t<T> p = in[i * inner], q = in[j * inner];
      if (largest ? less(q, p) : less(p, q)) return true;
      if (largest ? less(p, q) : less(q, p)) return false;
      return i < j;
    };
    for (int64_t i = 0; i < k; ++i) heap[i * inner] = i;
    heapify(heap, inner, k, before);
    for (int64_t i = k; i < n; ++i) {
      if (!before(i, heap[0])) continue;
      heap[0] = i;
      sift(heap, inner, 0, k, before);
    }
    sort_heap(heap, inner, k, before);
    for (int64_t i = 0; i < k; ++i) values.as<T>()[to + i * inner] = in[heap[i * inner] * inner];
  }
}

inline void top_k_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& k, int64_t axis, const char* wrong) {
  const bool good = k.n == 1 && k[0] >= 0 && k[0] <= x.shape[axis];
  sizes[0] = good ? k[0] : -1;
  if (!good) c.fail(wrong);
}

// The place of the largest (or smallest) of a line; NaN wins.
template <class T>
inline int64_t extreme(const T* x, int64_t step, int64_t n, bool largest, bool last) {
  using C = compute_t<T>;
  int64_t place = 0;
  C best = x[0];
  for (int64_t i = 1; i < n; ++i) {
    const C value = x[i * step];
    const bool better = best == best && (value != value || (largest ? value > best : value < best));
    if (better || (last && (value == best || (value != value && best != best)))) {
      place = i;
      best = value;
    }
  }
  return place;
}

template <class T>
inline void arg_extreme(const Context& c, const Tensor& y, const Tensor& x, int64_t axis, bool largest, bool last, const char* wrong) {
  const int a = static_cast<int>(axis);
  const int64_t n = x.rank ? x.shape[a] : 1, inner = x.count(a + 1, x.rank), lines = y.size();
  if (n == 0 && lines) return c.fail(wrong);
  for (int64_t line = c.begin(lines); line < c.end(lines); ++line) {
    const T* in = x.as<T>() + line / inner * n * inner + line % inner;
    y.as<int64_t>()[line] = extreme(in, inner, n, largest, last);
  }
}

// How what was accumulated takes one more element in.
namespace scan {
struct Sum {
  static constexpr int start = 0;
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a + b);
  }
};
struct Product {
  static constexpr int start = 1;
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a * b);
  }
};
}  // namespace scan

// Each element is what those up to it make together; `exclusive`, those before it.
template <class F, class T>
inline void cumulate(const Context& c, const Tensor& y, const Tensor& x, const Ints& axes, bool exclusive, bool reverse, const char* wrong) {
  const int64_t axis = axes.n == 1 && axes[0] < 0 ? axes[0] + x.rank : axes[0];
  if (axes.n != 1 || axis < 0 || axis >= x.rank) return c.fail(wrong);
  const int a = static_cast<int>(axis);
  const int64_t n = x.shape[a], inner = x.count(a + 1, x.rank), lines = x.count(0, a) * inner;
  using C = compute_t<T>;
  for (int64_t line = c.begin(lines); line < c.end(lines); ++line) {
    const int64_t first = line / inner * n * inner + line % inner;
    C total = static_cast<C>(F::start);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = first + (reverse ? n - 1 - k : k) * inner;
      const C before = total;
      total = F{}(total, static_cast<C>(x.as<T>()[at]));
      y.as<T>()[at] = static_cast<T>(exclusive ? before : total);
    }
  }
}

// -- Unique ---------------------------------------------------------------------------------------

// Slices of an axis (axis < 0: the elements) as things that are compared.
template <class T>
struct Slices {
  const T* x;
  int64_t outer, n, inner;

  Slices(const Tensor& t, int64_t axis) : x(t.as<T>()) {
    const int a = static_cast<int>(axis);
    outer = axis < 0 ? 1 : t.count(0, a);
    n = axis < 0 ? t.size() : t.shape[a];
    inner = axis < 0 ? 1 : t.count(a + 1, t.rank);
  }
  int compare(int64_t i, int64_t j) const {
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t k = 0; k < inner; ++k) {
        const compute_t<T> p = x[(o * n + i) * inner + k], q = x[(o * n + j) * inner + k];
        if (less(p, q)) return -1;
        if (less(q, p)) return 1;
      }
    }
    return 0;
  }
};

// Afterwards order[u] is the first of the slices that are equal to number u, and number[i] which of
// the results slice i is.
template <class T>
inline void unique_sizes(const Context&, int64_t* sizes, const Tensor& order, const Tensor& number, const Tensor& x, int64_t axis, bool sorted) {
  const Slices<T> s(x, axis);
  int64_t *o = order.as<int64_t>(), *id = number.as<int64_t>(), count = 0;
  sizes[0] = -1;
  if (!o || !id) return;  // no memory, which is reported
  const auto before = [&](int64_t i, int64_t j) {
    const int sign = s.compare(i, j);
    return sign < 0 || (sign == 0 && i < j);
  };
  for (int64_t i = 0; i < s.n; ++i) o[i] = i;
  heapify(o, 1, s.n, before);
  sort_heap(o, 1, s.n, before);
  if (sorted) {
    for (int64_t i = 0; i < s.n; ++i) {
      // o[count] is overwritten only at or before the place that is read
      const int64_t slice = o[i];
      if (i == 0 || s.compare(o[count - 1], slice) != 0) o[count++] = slice;
      id[slice] = count - 1;
    }
  } else {
    int64_t first = 0;
    for (int64_t i = 0; i < s.n; ++i) {
      if (i == 0 || s.compare(first, o[i]) != 0) first = o[i];
      id[o[i]] = first;
    }
    for (int64_t i = 0; i < s.n; ++i) {
      if (id[i] == i) {
        o[count] = i;
        id[i] = count++;
      } else {
        id[i] = id[id[i]];  // the first of the equal ones has its number already
      }
    }
  }
  sizes[0] = count;
}

inline void unique(const Context& c, const Tensor& y, const Tensor& indices, const Tensor& number, const Tensor& counts, const Tensor& order, const Tensor& x, int64_t axis, int64_t bytes) {
  const int a = static_cast<int>(axis);
  const int64_t n = number.size(), outer = axis < 0 ? 1 : x.count(0, a);
  const int64_t inner = (axis < 0 ? 1 : x.count(a + 1, x.rank)) * bytes, m = y.shape[axis < 0 ? 0 : a];
  const int64_t *o = order.as<int64_t>(), *id = number.as<int64_t>();
  for (int64_t row = c.begin(outer * m); row < c.end(outer * m); ++row) {
    std::memcpy(y.as<char>() + row * inner, x.as<char>() + (row / m * n + o[row % m]) * inner, static_cast<size_t>(inner));
  }
  copy_bytes(c, indices.data, o, m * 8);
  if (c.thread != 0) return;
  for (int64_t i = 0; i < m; ++i) counts.as<int64_t>()[i] = 0;
  for (int64_t i = 0; i < n; ++i) ++counts.as<int64_t>()[id[i]];
}

// -- NonMaxSuppression ----------------------------------------------------------------------------

struct Box {
  double x0, y0, x1, y1;

  Box(const float* b, bool center) {
    if (center) {  // x, y of the center, width, height
      x0 = b[0] - b[2] / 2.0;
      x1 = b[0] + b[2] / 2.0;
      y0 = b[1] - b[3] / 2.0;
      y1 = b[1] + b[3] / 2.0;
    } else {  // y, x of any two opposite corners
      y0 = b[0] < b[2] ? b[0] : b[2];
      y1 = b[0] < b[2] ? b[2] : b[0];
      x0 = b[1] < b[3] ? b[1] : b[3];
      x1 = b[1] < b[3] ? b[3] : b[1];
    }
  }
  double area() const { return (x1 - x0) * (y1 - y0); }
};

inline bool overlap(const Box& a, const Box& b, double threshold) {
  const double width = (a.x1 < b.x1 ? a.x1 : b.x1) - (a.x0 > b.x0 ? a.x0 : b.x0);
  const double height = (a.y1 < b.y1 ? a.y1 : b.y1) - (a.y0 > b.y0 ? a.y0 : b.y0);
  if (!(width > 0 && height > 0 && a.area() > 0 && b.area() > 0)) return false;
  const double both = width * height;
  return static_cast<float>(both / (a.area() + b.area() - both)) > static_cast<float>(threshold);
}

// Fills `chosen` with (batch * classes + class) * boxes + box.
inline void suppress_sizes(const Context& c, int64_t* sizes, const Tensor& order, const Tensor& chosen, const Tensor& boxes, const Tensor& scores, const Ints& most, const Tensor& iou, const Tensor& least, bool center, const char* wrong) {
  sizes[0] = -1;
  int64_t *o = order.as<int64_t>(), *found = chosen.as<int64_t>(), count = 0;
  if (!o || !found) return;
  const int64_t batches = scores.shape[0], classes = scores.shape[1], n = scores.shape[2];
  if (boxes.shape[0] != batches || boxes.shape[1] != n || boxes.shape[2] != 4) return c.fail(wrong);
  const int64_t limit = most.n ? most[0] : 0;
  const double threshold = iou ? *iou.as<float>() : 0.0;
  for (int64_t row = 0; row < batches * classes && limit > 0; ++row) {
    const float* s = scores.as<float>() + row * n;
    const float* b = boxes.as<float>() + row / classes * n * 4;
    const auto before = [&](int64_t i, int64_t j) { return s[i] > s[j] || (s[i] == s[j] && i < j); };
    int64_t candidates = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (s[i] == s[i] && (!least || s[i] > *least.as<float>())) o[candidates++] = i;
    }
    heapify(o, 1, candidates, before);
    sort_heap(o, 1, candidates, before);
    const int64_t first = count;
    for (int64_t i = 0; i < candidates && count - first < limit; ++i) {
      const Box box(b + 4 * o[i], center);
      bool kept = true;
      for (int64_t j = first; j < count && kept; ++j) {
        kept = !overlap(box, Box(b + 4 * (found[j] - row * n), center), threshold);
      }
      if (kept) found[count++] = row * n + o[i];
    }
  }
  sizes[0] = count;
}

inline void suppress(const Context& c, const Tensor& y, const Tensor& chosen, const Tensor& scores) {
  const int64_t classes = scores.shape[1], n = scores.shape[2];
  for (int64_t i = c.begin(y.shape[0]); i < c.end(y.shape[0]); ++i) {
    const int64_t code = chosen.as<int64_t>()[i];
    int64_t* out = y.as<int64_t>() + 3 * i;
    out[0] = code / n / classes;
    out[1] = code / n % classes;
    out[2] = code % n;
  }
}

}  // namespace
}  // namespace qg
