// Normalisations of any type. Moments are summed in double.
#pragma once
#include "sums.h"

namespace qg {
namespace {

// Mean and variance of value(i) for i below n.
struct Moments {
  double mean, variance;
  template <class Value>
  Moments(int64_t n, const Value& value) {
    const double count = static_cast<double>(n);
    mean = n ? sum_terms<double>(n, value) / count : 0;
    const double center = mean;
    variance = n ? sum_terms<double>(n,
                                     [&](int64_t i) {
                                       const double d = static_cast<double>(value(i)) - center;
                                       return d * d;
                                     }) /
                       count
                 : 0;
  }
};

// (x - mean) / sqrt(variance + eps) scale + bias by channel (axis 1).
template <class T, class S, class M>
inline void batch_norm(const Context& c, const Tensor& y, const Tensor& x, const Tensor& scale,
                       const Tensor& bias, const Tensor& mean, const Tensor& variance, double eps,
                       const char* wrong) {
  using Number = compute_t<T>;
  const int64_t channels = x.rank > 1 ? x.shape[1] : 1;
  const bool good = scale.size() == channels && bias.size() == channels &&
                    mean.size() == channels && variance.size() == channels;
  if (!good) return c.fail(wrong);
  const int64_t planes = (x.rank ? x.shape[0] : 1) * channels, n = planes ? x.size() / planes : 0;
  for (int64_t plane = c.begin(planes); plane < c.end(planes); ++plane) {
    const int64_t channel = plane % channels;
    const auto value = [&](const Tensor& t, auto type) {
      return static_cast<double>(
          static_cast<compute_t<decltype(type)>>(t.as<decltype(type)>()[channel]));
    };
    const double factor = value(scale, S{}) / __builtin_sqrt(value(variance, M{}) + eps);
    const Number a = static_cast<Number>(factor), center = static_cast<Number>(value(mean, M{}));
    const Number b = static_cast<Number>(value(bias, S{}));
    const T* from = x.as<T>() + plane * n;
    T* to = y.as<T>() + plane * n;
    for (int64_t i = 0; i < n; ++i)
      to[i] = static_cast<T>((static_cast<Number>(from[i]) - center) * a + b);
  }
}

// The same with the moments of x itself; those given are moved towards them.
template <class T, class S, class M>
inline void batch_norm_training(const Context& c, const Tensor& y, const Tensor& new_mean,
                                const Tensor& new_variance, const Tensor& x, const Tensor& scale,
                                const Tensor& bias, const Tensor& mean, const Tensor& variance,
                                double eps, double momentum, const char* wrong) {
  using Number = compute_t<T>;
  const int64_t channels = x.rank > 1 ? x.shape[1] : 1;
  const bool good = scale.size() == channels && bias.size() == channels &&
                    mean.size() == channels && variance.size() == channels;
  if (!good) return c.fail(wrong);
  const int64_t images = x.rank ? x.shape[0] : 1,
                n = images * channels ? x.size() / (images * channels) : 0;
  for (int64_t channel = c.begin(channels); channel < c.end(channels); ++channel) {
    const auto at = [&](int64_t i) { return (i / n * channels + channel) * n + i % n; };
    const Moments m(images * n, [&](int64_t i) { return static_cast<Number>(x.as<T>()[at(i)]); });
    const double factor = static_cast<double>(static_cast<compute_t<S>>(scale.as<S>()[channel])) /
                          __builtin_sqrt(m.variance + eps);
    const Number a = static_cast<Number>(factor), center = static_cast<Number>(m.mean);
    const Number b = static_cast<Number>(static_cast<compute_t<S>>(bias.as<S>()[channel]));
    for (int64_t i = 0; i < images * n; ++i) {
      y.as<T>()[at(i)] = static_cast<T>((static_cast<Number>(x.as<T>()[at(i)]) - center) * a + b);
    }
    const auto moved = [&](const Tensor& to, const Tensor& from, double now) {
      if (!to) return;
      const double before = static_cast<compute_t<M>>(from.as<M>()[channel]);
      to.as<M>()[channel] =
          static_cast<M>(static_cast<compute_t<M>>(before * momentum + now * (1 - momentum)));
    };
    moved(new_mean, mean, m.mean);
    moved(new_variance, variance, m.variance);
  }
}

// Every image of every channel by its own moments.
template <class T>
inline void instance_norm(const Context& c, const Tensor& y, const Tensor& x, const Tensor& scale,
                          const Tensor& bias, double eps, const char* wrong) {
  using Number = compute_t<T>;
  const int64_t channels = x.shape[1], planes = x.count(0, 2), n = x.count(2, x.rank);
  if (scale.size() != channels || bias.size() != channels) return c.fail(wrong);
  for (int64_t plane = c.begin(planes); plane < c.end(planes); ++plane) {
    const T* from = x.as<T>() + plane * n;
    T* to = y.as<T>() + plane * n;
    const Moments m(n, [&](int64_t i) { return static_cast<Number>(from[i]); });
    const double s = static_cast<double>(static_cast<Number>(scale.as<T>()[plane % channels]));
    const Number a = static_cast<Number>(s / __builtin_sqrt(m.variance + eps)),
                 center = static_cast<Number>(m.mean);
    const Number b = static_cast<Number>(bias.as<T>()[plane % channels]);
    for (int64_t i = 0; i < n; ++i)
      to[i] = static_cast<T>((static_cast<Number>(from[i]) - center) * a + b);
  }
}

// Rows over the axes from `axis` on: by mean and variance, or (rms) by the mean square alone; times
// scale, plus bias, which are broadcast to x. Y is the type of y, scale and bias.
template <class T, class Y, class U>
inline void layer_norm(const Context& c, const Tensor& y, const Tensor& mean,
                       const Tensor& deviation, const Tensor& x, const Tensor& scale,
                       const Tensor& bias, int64_t axis, bool rms, double eps, const char* wrong) {
  using Number = compute_t<T>;
  const int64_t rows = x.count(0, static_cast<int>(axis)),
                n = x.count(static_cast<int>(axis), x.rank);
  const auto fits_rows = [&](const Tensor& t) {
    for (int i = 0; t.rank <= x.rank && i < t.rank; ++i) {
      if (t.shape[i] != 1 && t.shape[i] != x.shape[x.rank - t.rank + i]) return false;
    }
    return t.rank <= x.rank;
  };
  if (!fits_rows(scale) || !fits_rows(bias)) return c.fail(wrong);
  const Strides scale_strides = broadcast_strides(scale, x),
                bias_strides = broadcast_strides(bias, x);
  const bool plain = scale.size() == n && scale.rank <= x.rank - axis &&
                     (!bias || (bias.size() == n && bias.rank <= x.rank - axis));
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const T* from = x.as<T>() + row * n;
    Y* to = y.as<Y>() + row * n;
    double center = 0, square = 0;
    if (rms) {
      const double sum = sum_terms<double>(n, [&](int64_t i) {
        const double v = static_cast<Number>(from[i]);
        return v * v;
      });
      square = n ? sum / static_cast<double>(n) : 0;
    } else {
      const Moments m(n, [&](int64_t i) { return static_cast<Number>(from[i]); });
      center = m.mean;
      square = m.variance;
    }
    const double inverse = 1 / __builtin_sqrt(square + eps);
    if (mean) mean.as<U>()[row] = static_cast<U>(static_cast<compute_t<U>>(center));
    if (deviation) deviation.as<U>()[row] = static_cast<U>(static_cast<compute_t<U>>(inverse));
    const Number a = static_cast<Number>(inverse), middle = static_cast<Number>(center);
    using Result = compute_t<Y>;
    if (plain) {
      for (int64_t i = 0; i < n; ++i) {
        Result v = static_cast<Result>((static_cast<Number>(from[i]) - middle) * a) *
                   static_cast<Result>(scale.as<Y>()[i]);
        if (bias) v += static_cast<Result>(bias.as<Y>()[i]);
        to[i] = static_cast<Y>(v);
      }
      continue;
    }
    if (n == 0) continue;
    Index at(row * n, x);
    for (int64_t i = 0; i < n; ++i, at.advance(x)) {
      Result v = static_cast<Result>((static_cast<Number>(from[i]) - middle) * a);
      v *= static_cast<Result>(scale.as<Y>()[at.offset(scale_strides, x.rank)]);
      if (bias) v += static_cast<Result>(bias.as<Y>()[at.offset(bias_strides, x.rank)]);
      to[i] = static_cast<Y>(v);
    }
  }
}

// x / (bias + alpha / size * sum of squares of the `size` channels around)^beta.
template <class T>
inline void lrn(const Context& c, const Tensor& y, const Tensor& x, double alpha, double beta,
                double bias, int64_t size) {
  using Number = compute_t<T>;
  const int64_t channels = x.shape[1], n = x.count(2, x.rank), planes = x.count(0, 2);
  const int64_t before = (size - 1) / 2, after = size - 1 - before;
  for (int64_t plane = c.begin(planes); plane < c.end(planes); ++plane) {
    const int64_t channel = plane % channels, image = plane / channels;
    const int64_t first = max(0, channel - before), last = min(channels - 1, channel + after);
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t from = first; from <= last; ++from) {
        const double v = static_cast<Number>(x.as<T>()[(image * channels + from) * n + i]);
        sum += v * v;
      }
      const double v = static_cast<Number>(x.as<T>()[plane * n + i]);
      const double scaled = bias + alpha / static_cast<double>(size) * sum;
      y.as<T>()[plane * n + i] =
          static_cast<T>(static_cast<Number>(v / __builtin_pow(scaled, beta)));
    }
  }
}

// x by its 1- or 2-norm along an axis; 0 where that is 0.
template <class T>
inline void lp_normalize(const Context& c, const Tensor& y, const Tensor& x, int64_t axis,
                         int64_t p) {
  using Number = compute_t<T>;
  const int64_t n = x.shape[axis], inner = x.count(static_cast<int>(axis) + 1, x.rank);
  const int64_t rows = n ? x.size() / n : 0;
  for (int64_t row = c.begin(rows); row < c.end(rows); ++row) {
    const int64_t base = row / inner * n * inner + row % inner;
    const double sum = sum_terms<double>(n, [&](int64_t i) {
      const double v = static_cast<Number>(x.as<T>()[base + i * inner]);
      return p == 1 ? __builtin_fabs(v) : v * v;
    });
    const double norm = p == 1 ? sum : __builtin_sqrt(sum);
    for (int64_t i = 0; i < n; ++i) {
      const double v = static_cast<Number>(x.as<T>()[base + i * inner]);
      y.as<T>()[base + i * inner] = static_cast<T>(static_cast<Number>(norm == 0 ? 0 : v / norm));
    }
  }
}

}  // namespace
}  // namespace qg
