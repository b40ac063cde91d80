// Convolutions of any type over one to three axes.
#pragma once
#include "window.h"

namespace qg {
namespace {

constexpr int kConvColumns = 64;

// The sums of n outputs of a row, from column `first` on, of output channel `channel`; the images
// of the group's channels begin at x, the channel's weights at w. at[0..1] are the row's indices.
template <bool kZeros, class X, class W, class Sum>
inline void conv_row(Sum* acc, const Window& g, const X* x, const W* w, int64_t channels,
                     int64_t depth, int64_t row, int64_t first, int64_t n, Sum x_zero, Sum w_zero) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t a = 0; a < g.kernel[0]; ++a) {
      const int64_t z = depth * g.stride[0] - g.pad[0] + a * g.dilation[0];
      if (z < 0 || z >= g.in[0]) continue;
      for (int64_t b = 0; b < g.kernel[1]; ++b) {
        const int64_t r = row * g.stride[1] - g.pad[1] + b * g.dilation[1];
        if (r < 0 || r >= g.in[1]) continue;
        const X* from = x + ((channel * g.in[0] + z) * g.in[1] + r) * g.in[2];
        const W* taps = w + ((channel * g.kernel[0] + a) * g.kernel[1] + b) * g.kernel[2];
        for (int64_t d = 0; d < g.kernel[2]; ++d) {
          Sum factor = static_cast<Sum>(taps[d]);
          if constexpr (kZeros) factor -= w_zero;
          const int64_t origin = first * g.stride[2] - g.pad[2] + d * g.dilation[2];
          const Inside in(origin, g.stride[2], g.in[2], n);
          if (g.stride[2] == 1 && in.low == 0 && in.high == kConvColumns) {
            const X* line = from + origin;
            for (int j = 0; j < kConvColumns; ++j) {
              Sum v = static_cast<Sum>(line[j]);
              if constexpr (kZeros) v -= x_zero;
              acc[j] += factor * v;
            }
            continue;
          }
          for (int64_t j = in.low; j < in.high; ++j) {
            Sum v = static_cast<Sum>(from[origin + j * g.stride[2]]);
            if constexpr (kZeros) v -= x_zero;
            acc[j] += factor * v;
          }
        }
      }
    }
  }
}

// All sums of a convolution; out(channel, to, sums, n) takes n neighbours from element `to` of y
// on.
template <bool kZeros, class X, class W, class Sum, class XZero, class WZero, class Out>
inline void conv_sums(const Context& c, const Tensor& y, const Tensor& x, const Tensor& w,
                      const Ints& strides, const Ints& dilations, const Ints& pads, int64_t group,
                      const XZero& x_zero, const WZero& w_zero, const char* wrong, const Out& out) {
  const Window g = window_of(y, x, sizes_of(w, 2), strides, dilations, pads);
  const int64_t channels = w.shape[1], n_out = w.shape[0], per_group = group ? n_out / group : 0;
  if (x.shape[1] != channels * group || per_group * group != n_out || y.shape[1] != n_out)
    return c.fail(wrong);
  const int64_t chunks = (g.out[2] + kConvColumns - 1) / kConvColumns;
  const int64_t rows = g.out[0] * g.out[1], total = x.shape[0] * n_out * rows * chunks;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t first = item % chunks * kConvColumns, row = item / chunks % rows;
    const int64_t plane = item / chunks / rows, channel = plane % n_out, image = plane / n_out;
    const int64_t n = min(kConvColumns, g.out[2] - first);
    Sum acc[kConvColumns] = {};
    conv_row<kZeros>(
        acc, g, x.as<X>() + (image * group + channel / per_group) * channels * g.in_size(),
        w.as<W>() + channel * channels * g.taps(), channels, row / g.out[1], row % g.out[1], first,
        n, static_cast<Sum>(x_zero()), static_cast<Sum>(w_zero(channel)));
    out(channel, (plane * rows + row) * g.out[2] + first, acc, n);
  }
}

template <class T>
inline void conv(const Context& c, const Tensor& y, const Tensor& x, const Tensor& w,
                 const Tensor& bias, const Ints& strides, const Ints& dilations, const Ints& pads,
                 int64_t group, const char* wrong) {
  using Sum = sum_t<T>;
  if (bias && bias.size() != w.shape[0]) return c.fail(wrong);
  const auto none = [] { return 0; };
  const auto no_zero = [](int64_t) { return 0; };
  conv_sums<false, T, T, Sum>(c, y, x, w, strides, dilations, pads, group, none, no_zero, wrong,
                              [&](int64_t channel, int64_t to, const Sum* sums, int64_t n) {
                                const Sum start =
                                    bias ? static_cast<Sum>(bias.as<T>()[channel]) : Sum(0);
                                for (int64_t j = 0; j < n; ++j)
                                  y.as<T>()[to + j] = static_cast<T>(sums[j] + start);
                              });
}

template <class X, class W>
inline void conv_integer(const Context& c, const Tensor& y, const Tensor& x, const Tensor& w,
                         const Tensor& x_zero, const Tensor& w_zero, const Ints& strides,
                         const Ints& dilations, const Ints& pads, int64_t group,
                         const char* wrong) {
  if (w_zero && w_zero.size() != 1 && w_zero.size() != w.shape[0]) return c.fail(wrong);
  conv_sums<true, X, W, uint32_t>(
      c, y, x, w, strides, dilations, pads, group, [&] { return x_zero ? *x_zero.as<X>() : 0; },
      [&](int64_t channel) { return w_zero ? each<W>(w_zero, channel) : 0; }, wrong,
      [&](int64_t, int64_t to, const uint32_t* sums, int64_t n) {
        for (int64_t j = 0; j < n; ++j) y.as<int32_t>()[to + j] = static_cast<int32_t>(sums[j]);
      });
}

// The codes of the convolution of the numbers that x and w stand for, and the bias, whose scale is
// x_scale w_scale.
template <class X, class W, class Y>
inline void qlinear_conv(const Context& c, const Tensor& y, const Tensor& x, const Tensor& x_scale,
                         const Tensor& x_zero, const Tensor& w, const Tensor& w_scale,
                         const Tensor& w_zero, const Tensor& y_scale, const Tensor& y_zero,
                         const Tensor& bias, const Ints& strides, const Ints& dilations,
                         const Ints& pads, int64_t group, const char* wrong) {
  const int64_t n_out = w.shape[0];
  if ((w_zero && w_zero.size() != 1 && w_zero.size() != n_out) ||
      (w_scale.size() != 1 && w_scale.size() != n_out) || (bias && bias.size() != n_out)) {
    return c.fail(wrong);
  }
  const int32_t zero = y_zero ? *y_zero.as<Y>() : 0;
  conv_sums<true, X, W, uint32_t>(
      c, y, x, w, strides, dilations, pads, group, [&] { return x_zero ? *x_zero.as<X>() : 0; },
      [&](int64_t channel) { return w_zero ? each<W>(w_zero, channel) : 0; }, wrong,
      [&](int64_t channel, int64_t to, const uint32_t* sums, int64_t n) {
        const float factor =
            *x_scale.as<float>() * each<float>(w_scale, channel) / *y_scale.as<float>();
        const uint32_t start = bias ? static_cast<uint32_t>(bias.as<int32_t>()[channel]) : 0;
        for (int64_t j = 0; j < n; ++j) {
          const double sum = static_cast<int32_t>(sums[j] + start);
          y.as<Y>()[to + j] = code_of<Y>(sum * static_cast<double>(factor), zero);
        }
      });
}

// Every input adds its share to the outputs that a convolution would have computed it from.
template <class T>
inline void conv_transpose(const Context& c, const Tensor& y, const Tensor& x, const Tensor& w,
                           const Tensor& bias, const Ints& strides, const Ints& dilations,
                           const Ints& pads, int64_t group, const char* wrong) {
  using Sum = sum_t<T>;
  const Window g = window_of(y, x, sizes_of(w, 2), strides, dilations, pads);
  const int64_t per_group = w.shape[1], n_out = per_group * group,
                channels = group ? w.shape[0] / group : 0;
  if (w.shape[0] != x.shape[1] || channels * group != w.shape[0] || y.shape[1] != n_out ||
      (bias && bias.size() != n_out)) {
    return c.fail(wrong);
  }
  const int64_t chunks = (g.out[2] + kConvColumns - 1) / kConvColumns;
  const int64_t rows = g.out[0] * g.out[1], total = x.shape[0] * n_out * rows * chunks;
  // The input row whose tap reaches an output row; -1: none.
  const auto source = [&](int axis, int64_t out, int64_t tap) {
    const int64_t at = out + g.pad[axis] - tap * g.dilation[axis];
    return at < 0 || at % g.stride[axis] != 0 || at / g.stride[axis] >= g.in[axis]
               ? int64_t(-1)
               : at / g.stride[axis];
  };
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t first = item % chunks * kConvColumns, row = item / chunks % rows;
    const int64_t plane = item / chunks / rows, channel = plane % n_out, image = plane / n_out;
    const int64_t n = min(kConvColumns, g.out[2] - first),
                  in_group = channel / per_group * channels;
    Sum acc[kConvColumns] = {};
    for (int64_t from = in_group; from < in_group + channels; ++from) {
      const T* taps = w.as<T>() + (from * per_group + channel % per_group) * g.taps();
      for (int64_t a = 0; a < g.kernel[0]; ++a) {
        const int64_t z = source(0, row / g.out[1], a);
        for (int64_t b = 0; z >= 0 && b < g.kernel[1]; ++b) {
          const int64_t r = source(1, row % g.out[1], b);
          if (r < 0) continue;
          const T* line =
              x.as<T>() + (((image * x.shape[1] + from) * g.in[0] + z) * g.in[1] + r) * g.in[2];
          for (int64_t d = 0; d < g.kernel[2]; ++d) {
            const Sum factor = static_cast<Sum>(taps[(a * g.kernel[1] + b) * g.kernel[2] + d]);
            // column i of the input goes to i stride + shift of acc
            const int64_t shift = d * g.dilation[2] - g.pad[2] - first, step = g.stride[2];
            const Inside in(shift, step, n, g.in[2]);
            for (int64_t i = in.low; i < in.high; ++i)
              acc[i * step + shift] += factor * static_cast<Sum>(line[i]);
          }
        }
      }
    }
    const Sum start = bias ? static_cast<Sum>(bias.as<T>()[channel]) : Sum(0);
    T* to = y.as<T>() + (plane * rows + row) * g.out[2] + first;
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(acc[j] + start);
  }
}

// An image [rows][columns] between its pixels; 0 outside.
template <class T>
inline compute_t<T> bilinear(const T* image, int64_t rows, int64_t columns, compute_t<T> y,
                             compute_t<T> x) {
  using Sum = compute_t<T>;
  if (!(y > -1 && x > -1 && y < static_cast<Sum>(rows) && x < static_cast<Sum>(columns))) return 0;
  const int64_t top = static_cast<int64_t>(y + 1) - 1,
                left = static_cast<int64_t>(x + 1) - 1;  // rounded down
  const Sum fy = y - static_cast<Sum>(top), fx = x - static_cast<Sum>(left);
  const auto pixel = [&](int64_t r, int64_t s) {
    return r < 0 || s < 0 || r >= rows || s >= columns ? Sum(0)
                                                       : static_cast<Sum>(image[r * columns + s]);
  };
  return (1 - fy) * ((1 - fx) * pixel(top, left) + fx * pixel(top, left + 1)) +
         fy * ((1 - fx) * pixel(top + 1, left) + fx * pixel(top + 1, left + 1));
}

// A 2-D convolution whose taps are moved by `offset` and weighted by `mask`.
template <class T>
inline void deform_conv(const Context& c, const Tensor& y, const Tensor& x, const Tensor& w,
                        const Tensor& offset, const Tensor& bias, const Tensor& mask,
                        const Ints& strides, const Ints& dilations, const Ints& pads, int64_t group,
                        int64_t offset_group, const char* wrong) {
  using Sum = compute_t<T>;
  const Window g = window_of(y, x, sizes_of(w, 2), strides, dilations, pads);
  const int64_t n_out = w.shape[0], channels = w.shape[1], per_group = group ? n_out / group : 0;
  const int64_t pixels = g.out_size(), taps = g.taps();
  if (x.shape[1] != channels * group || per_group * group != n_out || y.shape[1] != n_out ||
      offset_group < 1 || x.shape[1] % offset_group ||
      offset.size() != x.shape[0] * offset_group * taps * 2 * pixels ||
      (mask && mask.size() != x.shape[0] * offset_group * taps * pixels) ||
      (bias && bias.size() != n_out)) {
    return c.fail(wrong);
  }
  const int64_t per_offset = x.shape[1] / offset_group;
  const int64_t total = y.size();
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t pixel = item % pixels, plane = item / pixels, channel = plane % n_out,
                  image = plane / n_out;
    const int64_t row = pixel / g.out[2], column = pixel % g.out[2];
    Sum sum = bias ? static_cast<Sum>(bias.as<T>()[channel]) : Sum(0);
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t from = channel / per_group * channels + i;
      const int64_t moved = (image * offset_group + from / per_offset) * taps;
      const T* plane_in = x.as<T>() + (image * x.shape[1] + from) * g.in_size();
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* o = offset.as<T>() + (moved + tap) * 2 * pixels + pixel;
        const Sum at_y =
            static_cast<Sum>(row * g.stride[1] - g.pad[1] + tap / g.kernel[2] * g.dilation[1]) +
            static_cast<Sum>(o[0]);
        const Sum at_x =
            static_cast<Sum>(column * g.stride[2] - g.pad[2] + tap % g.kernel[2] * g.dilation[2]) +
            static_cast<Sum>(o[pixels]);
        Sum v = bilinear<T>(plane_in, g.in[1], g.in[2], at_y, at_x);
        if (mask) v *= static_cast<Sum>(mask.as<T>()[(moved + tap) * pixels + pixel]);
        sum += v * static_cast<Sum>(w.as<T>()[(channel * channels + i) * taps + tap]);
      }
    }
    y.as<T>()[item] = static_cast<T>(sum);
  }
}

}  // namespace
}  // namespace qg
