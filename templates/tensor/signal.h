// Discrete Fourier transforms of any length, and the mel filter bank. Sums are in double.
#pragma once
#include "sums.h"

namespace qg {
namespace {

constexpr double kTau = 6.283185307179586476925286766559;
constexpr int kBins = 8;

// Bins first .. first + kBins of the transform of n numbers, of which value(i, re, im) gives those
// below `given`; the others are 0.
template <class Value>
inline void dft_bins(double (&re)[kBins], double (&im)[kBins], int64_t first, int64_t n,
                     int64_t given, bool inverse, const Value& value) {
  constexpr int64_t kExact = 128;  // rotations between exact angles
  double turn_re[kBins], turn_im[kBins], at_re[kBins], at_im[kBins];
  const double unit = (inverse ? kTau : -kTau) / static_cast<double>(n);
  for (int j = 0; j < kBins; ++j) {
    re[j] = im[j] = 0;
    const double angle = unit * static_cast<double>((first + j) % n);
    turn_re[j] = __builtin_cos(angle);
    turn_im[j] = __builtin_sin(angle);
  }
  for (int64_t i = 0; i < given; ++i) {
    if (i % kExact == 0) {
      for (int j = 0; j < kBins; ++j) {
        const double angle = unit * static_cast<double>((first + j) % n * i % n);
        at_re[j] = __builtin_cos(angle);
        at_im[j] = __builtin_sin(angle);
      }
    }
    double x, y;
    value(i, x, y);
    for (int j = 0; j < kBins; ++j) {
      re[j] += x * at_re[j] - y * at_im[j];
      im[j] += x * at_im[j] + y * at_re[j];
      const double next = at_re[j] * turn_re[j] - at_im[j] * turn_im[j];
      at_im[j] = at_re[j] * turn_im[j] + at_im[j] * turn_re[j];
      at_re[j] = next;
    }
  }
}

// The axis from the front; -1: there is none.
inline int64_t dft_axis(const Tensor& x, const Ints& axis) {
  const int64_t a = axis.n == 1 ? (axis[0] < 0 ? axis[0] + x.rank : axis[0]) : -1;
  return a >= x.rank - 1 ? -1 : a;
}

// Numbers in the transform of x.
inline int64_t dft_length(const Tensor& x, const Ints& length, int64_t axis, bool symmetric) {
  if (axis < 0 || length.n > 1) return -1;
  return length.n ? length[0] : symmetric ? 2 * (x.shape[axis] - 1) : x.shape[axis];
}

// The size along the axis; those of all axes but the last if the run decides the axis (`all`).
inline void dft_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& length,
                      const Ints& axes, bool inverse, bool onesided, bool all, const char* wrong) {
  const int64_t axis = dft_axis(x, axes), n = dft_length(x, length, axis, inverse && onesided);
  if (n < 1) c.fail(wrong);
  const int64_t bins = n < 1 ? -1 : onesided && !inverse ? n / 2 + 1 : n;
  for (int i = 0; all && i < x.rank - 1; ++i) sizes[i] = i == axis || bins < 0 ? bins : x.shape[i];
  if (!all) sizes[0] = bins;
}

// Along an axis of x [.., 1 or 2]. No length: that of x, or what half a spectrum of x's size is of.
template <class T>
inline void dft(const Context& c, const Tensor& y, const Tensor& x, const Ints& length,
                const Ints& axes, bool inverse, bool onesided, const char* wrong) {
  const bool symmetric = inverse && onesided;
  const int64_t axis = dft_axis(x, axes);
  if (axis < 0) return c.fail(wrong);
  const int64_t given = x.shape[axis];
  const int64_t n = dft_length(x, length, axis, symmetric);
  const int64_t bins = y.shape[axis], parts = x.shape[x.rank - 1], y_parts = y.shape[y.rank - 1];
  const int64_t inner = x.count(static_cast<int>(axis) + 1, x.rank - 1),
                outer = x.count(0, static_cast<int>(axis));
  if (n < 1 || parts < 1 || parts > 2 || bins != (onesided && !inverse ? n / 2 + 1 : n)) {
    if (y.size()) c.fail(wrong);
    return;
  }
  const int64_t used = symmetric ? n : min(given, n);
  const int64_t chunks = (bins + kBins - 1) / kBins, total = outer * inner * chunks;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t first = item % chunks * kBins, line = item / chunks;
    const T* from = x.as<T>() + (line / inner * given * inner + line % inner) * parts;
    double re[kBins], im[kBins];
    dft_bins(re, im, first, n, used, inverse, [&](int64_t i, double& a, double& b) {
      const bool mirrored = symmetric && i > n / 2;
      const int64_t at = mirrored ? n - i : i;
      a = b = 0;
      if (at >= given) return;
      a = static_cast<compute_t<T>>(from[at * inner * parts]);
      if (parts == 2 && !(symmetric && (at == 0 || 2 * at == n)))
        b = static_cast<compute_t<T>>(from[at * inner * parts + 1]);
      if (mirrored) b = -b;
    });
    T* to = y.as<T>() + (line / inner * bins * inner + line % inner) * y_parts;
    const double scale = inverse ? 1 / static_cast<double>(n) : 1;
    for (int64_t j = 0; j < min(kBins, bins - first); ++j) {
      T* pair = to + (first + j) * inner * y_parts;
      pair[0] = static_cast<T>(static_cast<compute_t<T>>(re[j] * scale));
      if (y_parts == 2) pair[1] = static_cast<T>(static_cast<compute_t<T>>(im[j] * scale));
    }
  }
}

// Numbers of frames and bins.
inline void stft_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& step,
                       const Ints& length, bool onesided, const char* wrong) {
  const int64_t s = step.n == 1 ? step[0] : 0, n = length.n == 1 ? length[0] : 0;
  const bool good = s > 0 && n > 0 && n <= x.shape[1];
  if (!good) c.fail(wrong);
  sizes[0] = good ? (x.shape[1] - n) / s + 1 : -1;
  sizes[1] = good ? (onesided ? n / 2 + 1 : n) : -1;
}

template <class T>
inline void stft(const Context& c, const Tensor& y, const Tensor& x, const Tensor& window,
                 const Ints& step, const Ints& length, bool onesided, const char* wrong) {
  using Number = compute_t<T>;
  const int64_t n = length[0], frames = y.shape[1], bins = y.shape[2], samples = x.shape[1];
  const int64_t parts = x.rank > 2 ? x.shape[2] : 1;
  if (n < 1 || step[0] < 1 || parts < 1 || parts > 2 || bins != (onesided ? n / 2 + 1 : n) ||
      (window && window.size() > n) || (frames > 0 && (frames - 1) * step[0] + n > samples)) {
    return c.fail(wrong);
  }
  const int64_t given = window ? window.size() : n;
  const int64_t chunks = (bins + kBins - 1) / kBins, total = x.shape[0] * frames * chunks;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t first = item % chunks * kBins, frame = item / chunks % frames,
                  signal = item / chunks / frames;
    const T* from = x.as<T>() + (signal * samples + frame * step[0]) * parts;
    double re[kBins], im[kBins];
    dft_bins(re, im, first, n, given, false, [&](int64_t i, double& a, double& b) {
      const double w = window ? static_cast<double>(static_cast<Number>(window.as<T>()[i])) : 1;
      a = w * static_cast<double>(static_cast<Number>(from[i * parts]));
      b = parts == 2 ? w * static_cast<double>(static_cast<Number>(from[i * parts + 1])) : 0;
    });
    T* to = y.as<T>() + ((signal * frames + frame) * bins + first) * 2;
    for (int64_t j = 0; j < min(kBins, bins - first); ++j) {
      to[2 * j] = static_cast<T>(static_cast<Number>(re[j]));
      to[2 * j + 1] = static_cast<T>(static_cast<Number>(im[j]));
    }
  }
}

inline void mel_sizes(const Context& c, int64_t* sizes, const Ints& bands, const Ints& length,
                      const char* wrong) {
  const bool good = bands.n == 1 && length.n == 1 && bands[0] > 0 && length[0] > 0;
  if (!good) c.fail(wrong);
  sizes[0] = good ? length[0] / 2 + 1 : -1;
  sizes[1] = good ? bands[0] : -1;
}

// Triangles on the mel scale: y[bin][band] is how much a bin of the spectrum adds to a band.
template <class T, class F>
inline void mel_weights(const Context& c, const Tensor& y, const Tensor& lowest,
                        const Tensor& highest, const Ints& length, const Ints& rate,
                        const char* wrong) {
  using Number = compute_t<T>;
  const int64_t bins = y.shape[0], bands = y.shape[1], n = length[0];
  const double ln10 = 2.302585092994045684;
  const auto mel = [&](const Tensor& hertz) {
    return 2595 *
           __builtin_log1p(static_cast<double>(static_cast<compute_t<F>>(*hertz.as<F>())) / 700) /
           ln10;
  };
  const double low = mel(lowest), step = (mel(highest) - low) / static_cast<double>(bands + 2);
  if (rate.n != 1 || rate[0] < 1 || !(step < 1e9 && step > -1e9)) return c.fail(wrong);
  const auto bin = [&](int64_t i) {
    const double hertz = 700 * __builtin_expm1((static_cast<double>(i) * step + low) / 2595 * ln10);
    return __builtin_floor(static_cast<double>(n + 1) * hertz / static_cast<double>(rate[0]));
  };
  for (int64_t band = c.begin(bands); band < c.end(bands); ++band) {
    const double left = bin(band), center = bin(band + 1), right = bin(band + 2);
    if (!(left >= 0 && right >= left && right <= static_cast<double>(bins))) return c.fail(wrong);
    for (int64_t i = 0; i < bins; ++i) {
      const double at = static_cast<double>(i);
      double v = 0;
      if (at >= left && at <= center) v = center == left ? 1 : (at - left) / (center - left);
      if (at >= center && at < right) v = (right - at) / (right - center);
      y.as<T>()[i * bands + band] = static_cast<T>(static_cast<Number>(v));
    }
  }
}

}  // namespace
}  // namespace qg
