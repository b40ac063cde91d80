// Random numbers: number i of a node is a hash of its seed and i, so neither the number of threads
// nor the order matters, and every run makes the same ones.
#pragma once
#include "convert.h"
#include "tensor.h"

namespace qg {
namespace {

// 64 random bits: element `counter` of the SplitMix64 sequence that `seed` begins.
inline uint64_t random_bits(int64_t seed, int64_t counter) {
  uint64_t z = static_cast<uint64_t>(seed) + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(counter) + 1);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
// In [0, 1).
inline double random_unit(int64_t seed, int64_t counter) {
  return static_cast<double>(random_bits(seed, counter) >> 11) * 0x1p-53;
}

template <class Y>
inline void random_uniform(const Context& c, const Tensor& y, double low, double high, int64_t seed) {
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    y.as<Y>()[i] = convert<Y>(low + (high - low) * random_unit(seed, i));
  }
}

template <class Y>
inline void random_normal(const Context& c, const Tensor& y, double mean, double scale, int64_t seed) {
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    // Box-Muller; the logarithm is of a number in (0, 1]
    const double radius = __builtin_sqrt(-2 * __builtin_log(1 - random_unit(seed, 2 * i)));
    const double angle = 6.283185307179586477 * random_unit(seed, 2 * i + 1);
    y.as<Y>()[i] = convert<Y>(mean + scale * radius * __builtin_cos(angle));
  }
}

// 1 with the probability x.
template <class Y, class X>
inline void bernoulli(const Context& c, const Tensor& y, const Tensor& x, int64_t seed) {
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    y.as<Y>()[i] = convert<Y>(random_unit(seed, i) < static_cast<double>(static_cast<compute_t<X>>(x.as<X>()[i])));
  }
}

// Classes drawn with the probabilities softmax(x) of each row.
template <class Y, class X>
inline void multinomial(const Context& c, const Tensor& y, const Tensor& x, int64_t seed) {
  using V = compute_t<X>;
  const int64_t n = y.size(), classes = x.shape[1], samples = y.shape[1];
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    const X* row = x.as<X>() + i / samples * classes;
    double most = -__builtin_inf(), total = 0;
    for (int64_t j = 0; j < classes; ++j) most = static_cast<V>(row[j]) > most ? static_cast<V>(row[j]) : most;
    for (int64_t j = 0; j < classes; ++j) total += __builtin_exp(static_cast<V>(row[j]) - most);
    double rest = total * random_unit(seed, i);
    int64_t chosen = 0;
    for (int64_t j = 0; j < classes; ++j) {
      const double weight = __builtin_exp(static_cast<V>(row[j]) - most);
      if (weight > 0) chosen = j;  // what rounding leaves over is the last that is possible
      rest -= weight;
      if (rest < 0) break;
    }
    y.as<Y>()[i] = static_cast<Y>(chosen);
  }
}

// Training: drops with the probability `ratio`, and scales what it keeps. Otherwise y is x.
template <class T, class R>
inline void dropout(const Context& c, const Tensor& y, const Tensor& mask, const Tensor& x, const Tensor& ratio, const Tensor& training, int64_t seed, const char* wrong) {
  double p = training && *training.as<bool>() ? 0.5 : 0;
  if (p != 0 && ratio) p = static_cast<double>(static_cast<compute_t<R>>(*ratio.as<R>()));
  if (!(p >= 0 && p < 1)) return c.fail(wrong);
  const int64_t n = y.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    const bool kept = p == 0 || random_unit(seed, i) >= p;
    if (mask) mask.as<bool>()[i] = kept;
    const T v = x.as<T>()[i];
    y.as<T>()[i] = p == 0 ? v : convert<T>(kept ? static_cast<double>(static_cast<compute_t<T>>(v)) / (1 - p) : 0.0);
  }
}

}  // namespace
}  // namespace qg
