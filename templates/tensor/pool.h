// Pools of any type over one to three axes.
#pragma once
#include <type_traits>

#include "window.h"

namespace qg {
namespace {

// Calls tap(offset in the image) for the pixels of a window that lie in the image; returns how many
// taps lie in the image or its borders.
template <class Tap>
inline int64_t for_taps(const Window& g, int64_t out, const Tap& tap) {
  const int64_t o[kWindowAxes] = {out / (g.out[1] * g.out[2]), out / g.out[2] % g.out[1],
                                  out % g.out[2]};
  int64_t within = 1, begin[kWindowAxes];
  for (int axis = 0; axis < kWindowAxes; ++axis) {
    begin[axis] = o[axis] * g.stride[axis] - g.pad[axis];
    within *= max(0, Inside(begin[axis] + g.pad[axis], g.dilation[axis],
                            g.pad[axis] + g.in[axis] + g.end[axis], g.kernel[axis])
                         .high);
  }
  const Inside a(begin[0], g.dilation[0], g.in[0], g.kernel[0]);
  const Inside b(begin[1], g.dilation[1], g.in[1], g.kernel[1]);
  const Inside d(begin[2], g.dilation[2], g.in[2], g.kernel[2]);
  for (int64_t i = a.low; i < a.high; ++i) {
    for (int64_t j = b.low; j < b.high; ++j) {
      const int64_t row =
          ((begin[0] + i * g.dilation[0]) * g.in[1] + begin[1] + j * g.dilation[1]) * g.in[2];
      for (int64_t k = d.low; k < d.high; ++k) tap(row + begin[2] + k * g.dilation[2]);
    }
  }
  return within;
}

// Calls pixel(element of y, its image in x, its number in the image) for this thread's share of y.
template <class T, class Pixel>
inline void for_pixels(const Context& c, const Tensor& y, const Tensor& x, const Window& g,
                       const Pixel& pixel) {
  const int64_t size = g.out_size(), total = y.size();
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    pixel(item, x.as<T>() + item / size * g.in_size(), item % size);
  }
}

// The largest of every window and, if wanted, where it is: element of x, with the image's axes in
// reverse order if `columns_first`.
template <class T>
inline void max_pool(const Context& c, const Tensor& y, const Tensor& indices, const Tensor& x,
                     const Ints& kernel, const Ints& strides, const Ints& dilations,
                     const Ints& pads, bool columns_first) {
  using Number = compute_t<T>;
  const Window g = window_of(y, x, kernel, strides, dilations, pads);
  for_pixels<T>(c, y, x, g, [&](int64_t item, const T* image, int64_t out) {
    int64_t at = -1;
    Number best = 0;
    for_taps(g, out, [&](int64_t tap) {
      const Number v = static_cast<Number>(image[tap]);
      if (at < 0 || v > best || (v != v && best == best)) {
        best = v;
        at = tap;
      }
    });
    if (at < 0) {  // nothing but border
      if constexpr (std::is_integral_v<T>) {
        best = static_cast<T>(-1) < 0 ? static_cast<T>(1ull << (8 * sizeof(T) - 1)) : 0;
      } else {
        best = -static_cast<Number>(__builtin_inff());
      }
    }
    y.as<T>()[item] = static_cast<T>(best);
    if (!indices) return;
    if (columns_first && at >= 0) {
      const int64_t z = at / (g.in[1] * g.in[2]), r = at / g.in[2] % g.in[1], s = at % g.in[2];
      at = (s * g.in[1] + r) * g.in[0] + z;
    }
    indices.as<int64_t>()[item] = at < 0 ? -1 : item / g.out_size() * g.in_size() + at;
  });
}

template <class T>
inline void average_pool(const Context& c, const Tensor& y, const Tensor& x, const Ints& kernel,
                         const Ints& strides, const Ints& dilations, const Ints& pads,
                         bool with_border) {
  using Number = compute_t<T>;
  const Window g = window_of(y, x, kernel, strides, dilations, pads);
  for_pixels<T>(c, y, x, g, [&](int64_t item, const T* image, int64_t out) {
    Number sum = 0;
    int64_t count = 0;
    const int64_t within = for_taps(g, out, [&](int64_t tap) {
      sum += static_cast<Number>(image[tap]);
      ++count;
    });
    const int64_t n = with_border ? within : count;
    y.as<T>()[item] = static_cast<T>(n ? sum / static_cast<Number>(n) : Number(0));
  });
}

// |x|^p, and the p-th root of a sum of those.
template <class Number>
inline Number power_term(Number x, double p) {
  const Number size = x < 0 ? -x : x;
  return p == 1   ? size
         : p == 2 ? size * size
                  : static_cast<Number>(__builtin_pow(static_cast<double>(size), p));
}
template <class Number>
inline Number power_root(Number sum, double p) {
  if (p == 1) return sum;
  if (p == 2) return static_cast<Number>(__builtin_sqrt(static_cast<double>(sum)));
  return static_cast<Number>(__builtin_pow(static_cast<double>(sum), 1 / p));
}

template <class T>
inline void lp_pool(const Context& c, const Tensor& y, const Tensor& x, const Ints& kernel,
                    const Ints& strides, const Ints& dilations, const Ints& pads, double p) {
  using Number = compute_t<T>;
  const Window g = window_of(y, x, kernel, strides, dilations, pads);
  for_pixels<T>(c, y, x, g, [&](int64_t item, const T* image, int64_t out) {
    Number sum = 0;
    for_taps(g, out, [&](int64_t tap) { sum += power_term(static_cast<Number>(image[tap]), p); });
    y.as<T>()[item] = static_cast<T>(power_root(sum, p));
  });
}

// Pools over whole images.
template <class T>
inline void global_average_pool(const Context& c, const Tensor& y, const Tensor& x) {
  const int64_t total = y.size(), n = total ? x.size() / total : 0;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const T* image = x.as<T>() + item * n;
    const double sum =
        sum_terms<double>(n, [&](int64_t i) { return static_cast<compute_t<T>>(image[i]); });
    y.as<T>()[item] = static_cast<T>(static_cast<compute_t<T>>(sum / static_cast<double>(n)));
  }
}

template <class T>
inline void global_max_pool(const Context& c, const Tensor& y, const Tensor& x) {
  using Number = compute_t<T>;
  const int64_t total = y.size(), n = total ? x.size() / total : 0;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const T* image = x.as<T>() + item * n;
    Number best = n ? static_cast<Number>(image[0]) : -static_cast<Number>(__builtin_inff());
    for (int64_t i = 1; i < n; ++i) {
      const Number v = static_cast<Number>(image[i]);
      best = v > best || v != v ? v : best;
    }
    y.as<T>()[item] = static_cast<T>(best);
  }
}

template <class T>
inline void global_lp_pool(const Context& c, const Tensor& y, const Tensor& x, double p) {
  const int64_t total = y.size(), n = total ? x.size() / total : 0;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const T* image = x.as<T>() + item * n;
    const double sum = sum_terms<double>(
        n, [&](int64_t i) { return power_term(static_cast<compute_t<T>>(image[i]), p); });
    y.as<T>()[item] = static_cast<T>(static_cast<compute_t<T>>(power_root(sum, p)));
  }
}

}  // namespace
}  // namespace qg
