// Kernels that read images between their pixels: Resize, GridSample, AffineGrid, RoiAlign.
#pragma once
#include <type_traits>

#include "tensor.h"

namespace qg {
namespace {

enum class Resampling { kNearest, kLinear, kCubic };
enum class Coordinates {
  kHalfPixel, kHalfPixelSymmetric, kPytorchHalfPixel, kAlignCorners, kAsymmetric, kCrop,
  kHalfPixelForNearest,
};
enum class Rounding { kRoundPreferFloor, kRoundPreferCeil, kFloor, kCeil };
enum class Aspect { kStretch, kNotLarger, kNotSmaller };
enum class Outside { kZeros, kBorder, kReflection };

// The convolution that cubic interpolation weighs a pixel at a distance with.
inline double cubic_weight(double distance, double a) {
  const double x = distance < 0 ? -distance : distance;
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

// Sums are taken in float where that is exact enough for T.
template <class T>
using sampled_t = std::conditional_t<(sizeof(T) < 4 || std::is_same_v<T, float>), float, double>;

// A sum as T: integers round to the nearest and saturate.
template <class T, class S>
inline T resampled(S value) {
  if constexpr (std::is_integral_v<T>) {
    constexpr int bits = 8 * sizeof(T) - (static_cast<T>(-1) < T(0) ? 1 : 0);
    constexpr T most = static_cast<T>(~uint64_t(0) >> (64 - bits)), least = static_cast<T>(~most);
    const double x = __builtin_rint(static_cast<double>(value)), limit = __builtin_ldexp(1.0, bits);
    if (x >= limit) return most;
    return x > static_cast<double>(least) ? static_cast<T>(x) : least;
  } else {
    return static_cast<T>(static_cast<compute_t<T>>(value));
  }
}

// How one axis is resampled.
struct Sampler {
  int64_t in, out;
  double scale, roi_start, roi_end;
  bool same;  // nothing happens to the axis
};

struct Resizing {
  Resampling mode;
  Coordinates coordinates;
  Rounding rounding;
  double cubic_a;
  bool exclude_outside, antialias;

  // Pixels that one result is made of.
  int64_t taps(const Sampler& s) const {
    if (s.same || mode == Resampling::kNearest) return 1;
    const int64_t reach = mode == Resampling::kLinear ? 1 : 2;
    if (!antialias || s.scale >= 1) return 2 * reach;
    const double wide = __builtin_ceil(static_cast<double>(reach) / s.scale);
    return wide < 1e6 ? 2 * static_cast<int64_t>(wide) : int64_t(2000000);
  }

  double position(const Sampler& s, int64_t i) const {
    const double x = static_cast<double>(i), in = static_cast<double>(s.in), out = in * s.scale;
    switch (coordinates) {
      case Coordinates::kAlignCorners:
        return out == 1 ? 0 : x * (in - 1) / (out - 1);
      case Coordinates::kAsymmetric:
        return x / s.scale;
      case Coordinates::kCrop:
        return s.roi_start * (in - 1) +
               (out == 1 ? (s.roi_end - s.roi_start) * (in - 1) / 2
                         : x * (s.roi_end - s.roi_start) * (in - 1) / (out - 1));
      case Coordinates::kPytorchHalfPixel:
        return out == 1 ? -0.5 : (x + 0.5) / s.scale - 0.5;
      case Coordinates::kHalfPixelSymmetric:
        return in / 2 * (1 - static_cast<double>(s.out) / out) + (x + 0.5) / s.scale - 0.5;
      case Coordinates::kHalfPixelForNearest:
        return (x + 0.5) / s.scale;
      case Coordinates::kHalfPixel:
        break;
    }
    return (x + 0.5) / s.scale - 0.5;
  }

  // Where the n pixels of result i are, and their weights, `step` apart; false if it lies outside of
  // a crop.
  template <class S>
  bool sample(const Sampler& s, int64_t i, int64_t n, int64_t* index, S* weight, int64_t step = 1) const {
    if (s.same) {
      index[0] = i;
      weight[0] = 1;
      return true;
    }
    const double limit = 4e15;
    double x = position(s, i);
    const bool inside = coordinates != Coordinates::kCrop || (x >= 0 && x <= static_cast<double>(s.in - 1));
    x = x > -limit ? (x < limit ? x : limit) : -limit;
    const double low = __builtin_floor(x), ratio = x - low;
    const int64_t floor = static_cast<int64_t>(low);
    if (mode == Resampling::kNearest) {
      const bool up = rounding == Rounding::kRoundPreferFloor  ? ratio > 0.5
                      : rounding == Rounding::kRoundPreferCeil ? ratio >= 0.5
                                                               : rounding == Rounding::kCeil && ratio > 0;
      index[0] = max(0, min(floor + up, s.in - 1));
      weight[0] = 1;
      return inside;
    }
    const double narrow = antialias && s.scale < 1 ? s.scale : 1;
    double total = 0;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t offset = t + 1 - n / 2, at = floor + offset;
      const double distance = (static_cast<double>(offset) - ratio) * narrow;
      const double linear = 1 - (distance < 0 ? -distance : distance);
      double w = mode == Resampling::kCubic ? cubic_weight(distance, cubic_a) : linear > 0 ? linear : 0;
      if (exclude_outside && (at < 0 || at >= s.in)) w = 0;
      index[t * step] = max(0, min(at, s.in - 1));
      weight[t * step] = static_cast<S>(w);
      total += w;
    }
    if ((antialias || exclude_outside) && total != 0) {
      for (int64_t t = 0; t < n; ++t) {
        weight[t * step] = static_cast<S>(static_cast<double>(weight[t * step]) / total);
      }
    }
    return inside;
  }
};

// The samplers of x's axes, and the sizes that they make; false if the parameters make no sense.
template <class R>
inline bool samplers_of(const Tensor& x, const Tensor& roi, const Tensor& scales, const Ints& sizes, const Ints& axes, Aspect aspect, bool crop, Sampler (&samplers)[kMaxRank]) {
  const int n = axes.n ? axes.n : x.rank;
  const bool scaled = scales && scales.size();
  if (scaled ? scales.size() != n : sizes.n != n) return false;
  if (crop && (!roi || roi.size() != 2 * n)) return false;
  for (int i = 0; i < x.rank; ++i) samplers[i] = {x.shape[i], x.shape[i], 1, 0, 1, true};
  double common = 0;
  for (int pass = 0; pass < 2; ++pass) {  // first what all axes have in common
    for (int i = 0; i < n; ++i) {
      const int64_t axis = axes.n ? (axes[i] < 0 ? axes[i] + x.rank : axes[i]) : i;
      if (axis < 0 || axis >= x.rank || (!scaled && sizes[i] < 0)) return false;
      Sampler& s = samplers[axis];
      const double in = static_cast<double>(s.in);
      const double scale = scaled ? static_cast<double>(scales.as<float>()[i]) : static_cast<double>(sizes[i]) / in;
      if (pass == 0) {
        if (i == 0 || (aspect == Aspect::kNotLarger ? scale < common : scale > common)) common = scale;
        continue;
      }
      const bool shared = !scaled && aspect != Aspect::kStretch;
      s.scale = shared ? common : scale;
      const double out = s.scale * in + (shared ? 0.5 : 0);
      if (scaled && !(s.scale > 0)) return false;
      if (in > 0 && !(out >= 0 && out < 1e15)) return false;
      s.out = scaled || shared ? (in > 0 ? static_cast<int64_t>(out) : 0) : sizes[i];
      s.same = s.in == s.out && s.scale > 1 - 1e-9 && s.scale < 1 + 1e-9;
      if (crop) {
        s.roi_start = static_cast<double>(static_cast<compute_t<R>>(roi.as<R>()[i]));
        s.roi_end = static_cast<double>(static_cast<compute_t<R>>(roi.as<R>()[n + i]));
        s.same = s.same && s.roi_start == 0 && s.roi_end == 1;
      }
    }
  }
  return true;
}

template <class R>
inline void resize_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Tensor& roi, const Tensor& scales, const Ints& asked, const Ints& axes, Aspect aspect, bool crop, const Ints& which, const char* wrong) {
  Sampler samplers[kMaxRank];
  const bool good = samplers_of<R>(x, roi, scales, asked, axes, aspect, crop, samplers);
  if (!good) c.fail(wrong);
  for (int i = 0; i < which.n; ++i) sizes[i] = good ? samplers[which[i]].out : -1;
}

constexpr int kTaps = 1024;  // entries of the tables of positions and weights

template <class T, class R>
inline void resize(const Context& c, const Tensor& y, const Tensor& x, const Tensor& roi, const Tensor& scales, const Ints& sizes, const Ints& axes, Aspect aspect, const Resizing& how, double extrapolation, const char* wrong, const char* narrow) {
  using S = sampled_t<T>;
  Sampler samplers[kMaxRank];
  if (!samplers_of<R>(x, roi, scales, sizes, axes, aspect, how.coordinates == Coordinates::kCrop, samplers)) return c.fail(wrong);
  int b = -1, outer_taps = 0;  // the innermost axis that changes is done in blocks
  int64_t taps[kMaxRank];
  for (int i = 0; i < y.rank; ++i) {
    if (samplers[i].out != y.shape[i]) return c.fail(wrong);
    if (!samplers[i].same) b = i;
  }
  if (b < 0) return copy_tensor(c, y, x, sizeof(T));
  if (y.size() == 0) return;
  if (x.size() == 0) return c.fail(wrong);
  for (int i = 0; i <= b; ++i) {
    taps[i] = how.taps(samplers[i]);
    if (taps[i] > kTaps) return c.fail(narrow);
    if (i < b) outer_taps += static_cast<int>(taps[i]);
  }
  if (outer_taps > kTaps) return c.fail(narrow);
  const int64_t n = taps[b], width = y.shape[b], inner = y.count(b + 1, y.rank), rows = y.count(0, b);
  const int64_t block = min(128, kTaps / n);
  const Strides strides = strides_of(x);
  const T beyond = resampled<T>(extrapolation);
  int64_t index[kTaps], outer_index[kTaps];
  S weight[kTaps], outer_weight[kTaps], sum[128];
  bool inside[128];
  Tensor outer = y;
  outer.rank = b;
  for (int64_t j0 = 0; j0 < width; j0 += block) {
    const int64_t count = min(block, width - j0);
    bool all_inside = true;
    for (int64_t j = 0; j < count; ++j) {
      inside[j] = how.sample(samplers[b], j0 + j, n, index + j, weight + j, block);
      all_inside = all_inside && inside[j];
    }
    const int64_t first = c.begin(rows), end = c.end(rows);
    Index at(first, outer);
    for (int64_t row = first; row < end; ++row, at.advance(outer)) {
      bool within = true;
      int64_t combinations = 1;
      for (int i = 0, table = 0; i < b; ++i) {
        within = how.sample(samplers[i], at.v[i], taps[i], outer_index + table, outer_weight + table) && within;
        table += static_cast<int>(taps[i]);
        combinations *= taps[i];
      }
      // Pixels of the outer axes, one combination after the other.
      const auto pixel = [&](int64_t combination, S& w) {
        int64_t offset = 0;
        w = 1;
        for (int i = b - 1, table = outer_taps; i >= 0; --i) {
          table -= static_cast<int>(taps[i]);
          const int64_t t = table + combination % taps[i];
          combination /= taps[i];
          offset += outer_index[t] * strides[i];
          w *= outer_weight[t];
        }
        return x.as<T>() + offset;
      };
      T* out = y.as<T>() + (row * width + j0) * inner;
      if (how.mode == Resampling::kNearest) {
        S one;
        const T* in = pixel(0, one);
        if (inner == 1 && within && all_inside) {
          for (int64_t j = 0; j < count; ++j) out[j] = in[index[j]];
          continue;
        }
        for (int64_t j = 0; j < count; ++j) {
          if (within && inside[j]) {
            std::memcpy(out + j * inner, in + index[j] * inner, static_cast<size_t>(inner) * sizeof(T));
          } else {
            for (int64_t k = 0; k < inner; ++k) out[j * inner + k] = beyond;
          }
        }
        continue;
      }
      if (inner == 1) {
        for (int64_t j = 0; j < count; ++j) sum[j] = 0;
        for (int64_t k = 0; k < combinations; ++k) {
          S w;
          const T* in = pixel(k, w);
          if (w == 0) continue;
          for (int64_t t = 0; t < n; ++t) {
            const int64_t* at_tap = index + t * block;
            const S* of_tap = weight + t * block;
            for (int64_t j = 0; j < count; ++j) sum[j] += w * of_tap[j] * static_cast<S>(in[at_tap[j]]);
          }
        }
        for (int64_t j = 0; j < count; ++j) out[j] = within && inside[j] ? resampled<T>(sum[j]) : beyond;
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t l0 = 0; l0 < inner; l0 += 128) {
          const int64_t lanes = min(128, inner - l0);
          for (int64_t l = 0; l < lanes; ++l) sum[l] = 0;
          for (int64_t k = 0; k < combinations; ++k) {
            S w;
            const T* in = pixel(k, w) + l0;
            if (w == 0) continue;
            for (int64_t t = 0; t < n; ++t) {
              const S product = w * weight[t * block + j];
              const T* lane = in + index[t * block + j] * inner;
              for (int64_t l = 0; l < lanes; ++l) sum[l] += product * static_cast<S>(lane[l]);
            }
          }
          for (int64_t l = 0; l < lanes; ++l) out[j * inner + l0 + l] = within && inside[j] ? resampled<T>(sum[l]) : beyond;
        }
      }
    }
  }
}

// -- GridSample -----------------------------------------------------------------------------------

// x brought between low and high by reflection at them.
template <class S>
inline S reflected(S x, S low, S high) {
  const S span = high - low;
  if (!(span > 0)) return low;
  if (x >= low && x <= high) return x;
  const S distance = x < low ? low - x : x - high;
  const S turns = __builtin_floor(distance / span), rest = distance - turns * span;
  const bool even = turns - 2 * __builtin_floor(turns / 2) == 0;
  return (x < low) == even ? low + rest : high - rest;
}

// Places of `grid` are in -1..1, the innermost axis first.
template <class T, class G>
inline void grid_sample(const Context& c, const Tensor& y, const Tensor& x, const Tensor& grid, Resampling mode, Outside outside, bool align_corners, const char* wrong) {
  using S = sampled_t<T>;
  using P = sampled_t<G>;
  const int r = x.rank - 2;
  if (grid.shape[0] != x.shape[0] || grid.shape[grid.rank - 1] != r) return c.fail(wrong);
  const int64_t points = grid.count(1, grid.rank - 1), pixels = x.count(2, x.rank), channels = x.shape[1];
  if (y.size() && !pixels) return c.fail(wrong);
  const int n = mode == Resampling::kNearest ? 1 : mode == Resampling::kLinear ? 2 : 4;
  const Strides strides = strides_of(x);
  const int64_t items = x.shape[0] * points;
  for (int64_t item = c.begin(items); item < c.end(items); ++item) {
    int64_t offsets[64] = {0};
    S weights[64] = {1};
    int count = 1;
    for (int a = 0; a < r; ++a) {
      const P g = static_cast<P>(static_cast<compute_t<G>>(grid.as<G>()[item * r + (r - 1 - a)]));
      const int64_t d = x.shape[2 + a];
      const P size = static_cast<P>(d), low = align_corners ? P(0) : P(-0.5);
      const P high = align_corners ? size - 1 : size - P(0.5);
      P v = align_corners ? (g + 1) / 2 * (size - 1) : ((g + 1) * size - 1) / 2;
      if (!(v > P(-1e9) && v < P(1e9))) v = P(-1e9);  // NaN and infinity too
      if (mode == Resampling::kNearest) v = static_cast<P>(__builtin_rint(static_cast<double>(v)));
      if (v < low || v > high) {
        if (outside == Outside::kBorder) v = v < 0 ? P(0) : size - 1;
        if (outside == Outside::kReflection) v = reflected(v, low, high);
      }
      const int64_t floor = static_cast<int64_t>(__builtin_floor(static_cast<double>(v)));
      const double ratio = static_cast<double>(v) - static_cast<double>(floor);
      int64_t index[4];
      S weight[4];
      for (int t = 0; t < n; ++t) {
        const int offset = n == 4 ? t - 1 : t;
        int64_t at = floor + offset;
        const double distance = offset - ratio;
        weight[t] = static_cast<S>(n == 1 ? 1 : n == 4 ? cubic_weight(distance, -0.75) : 1 - (distance < 0 ? -distance : distance));
        if (outside == Outside::kZeros && (at < 0 || at >= d)) weight[t] = 0;
        if (outside == Outside::kReflection) at = static_cast<int64_t>(reflected(static_cast<P>(at), low, high));
        index[t] = max(0, min(at, d - 1)) * strides[2 + a];
      }
      for (int k = count * n - 1; k >= 0; --k) {  // from the end: what is read is still there
        weights[k] = weights[k / n] * weight[k % n];
        offsets[k] = offsets[k / n] + index[k % n];
      }
      count *= n;
    }
    const int64_t batch = item / points;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const T* in = x.as<T>() + (batch * channels + channel) * pixels;
      T& out = y.as<T>()[(batch * channels + channel) * points + item % points];
      if (n == 1) {
        out = weights[0] == 0 ? resampled<T>(S(0)) : in[offsets[0]];
        continue;
      }
      S sum = 0;
      for (int k = 0; k < count; ++k) sum += weights[k] * static_cast<S>(in[offsets[k]]);
      out = resampled<T>(sum);
    }
  }
}

// The places of a grid that `theta` moves: the pixels of an image in -1..1, the innermost axis first.
template <class T>
inline void affine_grid(const Context& c, const Tensor& y, const Tensor& theta, bool align_corners, const char* wrong) {
  using S = sampled_t<T>;
  const int r = y.rank - 2;
  const int64_t points = y.count(1, r + 1), items = y.shape[0] * points;
  if (theta.shape[0] != y.shape[0] || theta.shape[1] != r || theta.shape[2] != r + 1) return c.fail(wrong);
  for (int64_t item = c.begin(items); item < c.end(items); ++item) {
    S place[3] = {0, 0, 0};
    int64_t rest = item;
    for (int j = 0; j < r; ++j) {
      const int64_t d = y.shape[r - j], k = rest % d;
      rest /= d;
      if (!align_corners) place[j] = static_cast<S>(2 * k + 1) / static_cast<S>(d) - 1;
      if (align_corners && d > 1) place[j] = static_cast<S>(2 * k) / static_cast<S>(d - 1) - 1;
    }
    for (int i = 0; i < r; ++i) {
      const T* row = theta.as<T>() + (item / points * r + i) * (r + 1);
      S sum = static_cast<S>(row[r]);
      for (int j = 0; j < r; ++j) sum += static_cast<S>(row[j]) * place[j];
      y.as<T>()[item * r + i] = static_cast<T>(sum);
    }
  }
}

// [N, C, sizes] -> [N, sizes, number of sizes]
inline void affine_grid_sizes(const Context& c, int64_t* sizes, const Ints& asked, const Ints& which, const char* wrong) {
  for (int i = 0; i < which.n; ++i) {
    const int axis = static_cast<int>(which[i]);
    sizes[i] = asked[axis == 0 ? 0 : axis + 1];
    if (sizes[i] < 0) c.fail(wrong);
  }
}

// -- RoiAlign -------------------------------------------------------------------------------------

// Bins of a region, each the mean (or the maximum) of bilinear samples.
template <class T>
inline void roi_align(const Context& c, const Tensor& y, const Tensor& x, const Tensor& rois, const Tensor& batches, bool average, bool half_pixel, int64_t ratio, double spatial_scale, const char* wrong) {
  using S = sampled_t<T>;
  const int64_t channels = x.shape[1], h = x.shape[2], w = x.shape[3], bins_h = y.shape[2], bins_w = y.shape[3];
  if (rois.shape[0] != batches.shape[0] || rois.shape[1] != 4 || (y.size() && h * w == 0)) return c.fail(wrong);
  const int64_t items = rois.shape[0] * channels;
  for (int64_t item = c.begin(items); item < c.end(items); ++item) {
    const int64_t roi = item / channels, batch = batches.as<int64_t>()[roi];
    T* out = y.as<T>() + item * bins_h * bins_w;
    S edge[4];
    bool good = batch >= 0 && batch < x.shape[0];
    for (int i = 0; i < 4; ++i) {
      edge[i] = static_cast<S>(rois.as<T>()[roi * 4 + i]) * static_cast<S>(spatial_scale) - static_cast<S>(half_pixel ? 0.5 : 0);
      good = good && edge[i] > S(-1e6) && edge[i] < S(1e6);
    }
    if (!good) {
      c.fail(wrong);
      for (int64_t i = 0; i < bins_h * bins_w; ++i) out[i] = static_cast<T>(S(0));
      continue;
    }
    S width = edge[2] - edge[0], height = edge[3] - edge[1];
    if (!half_pixel) {
      width = width > 1 ? width : 1;
      height = height > 1 ? height : 1;
    }
    const S bin_h = height / static_cast<S>(bins_h), bin_w = width / static_cast<S>(bins_w);
    const int64_t grid_h = ratio > 0 ? ratio : static_cast<int64_t>(__builtin_ceil(static_cast<double>(bin_h)));
    const int64_t grid_w = ratio > 0 ? ratio : static_cast<int64_t>(__builtin_ceil(static_cast<double>(bin_w)));
    const T* in = x.as<T>() + (batch * channels + item % channels) * h * w;
    for (int64_t bin = 0; bin < bins_h * bins_w; ++bin) {
      S result = 0;
      bool some = false;
      for (int64_t i = 0; i < grid_h * grid_w && grid_h > 0; ++i) {
        const S fy = static_cast<S>(i / grid_w) + S(0.5), fx = static_cast<S>(i % grid_w) + S(0.5);
        S py = edge[1] + static_cast<S>(bin / bins_w) * bin_h + fy * bin_h / static_cast<S>(grid_h);
        S px = edge[0] + static_cast<S>(bin % bins_w) * bin_w + fx * bin_w / static_cast<S>(grid_w);
        S part[4] = {0, 0, 0, 0};
        if (py >= -1 && py <= static_cast<S>(h) && px >= -1 && px <= static_cast<S>(w)) {
          py = py > 0 ? py : 0;
          px = px > 0 ? px : 0;
          const int64_t y0 = min(static_cast<int64_t>(py), h - 1), x0 = min(static_cast<int64_t>(px), w - 1);
          const int64_t y1 = min(y0 + 1, h - 1), x1 = min(x0 + 1, w - 1);
          const S ly = y0 == h - 1 ? S(0) : py - static_cast<S>(y0), lx = x0 == w - 1 ? S(0) : px - static_cast<S>(x0);
          part[0] = (1 - ly) * (1 - lx) * static_cast<S>(in[y0 * w + x0]);
          part[1] = (1 - ly) * lx * static_cast<S>(in[y0 * w + x1]);
          part[2] = ly * (1 - lx) * static_cast<S>(in[y1 * w + x0]);
          part[3] = ly * lx * static_cast<S>(in[y1 * w + x1]);
        }
        if (average) {
          result += part[0] + part[1] + part[2] + part[3];
          continue;
        }
        for (int k = 0; k < 4; ++k) result = (some || k) && result > part[k] ? result : part[k];
        some = true;
      }
      const int64_t samples = max(grid_h * grid_w, 1);
      out[bin] = static_cast<T>(average ? result / static_cast<S>(samples) : result);
    }
  }
}

}  // namespace
}  // namespace qg
