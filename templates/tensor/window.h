// Windows over one to three axes behind [batch][channels], for convolutions and pools.
#pragma once
#include "sums.h"

namespace qg {
namespace {

constexpr int kWindowAxes = 3;

// Sizes by axis; absent leading axes have the size 1.
struct Window {
  int64_t in[kWindowAxes], out[kWindowAxes], kernel[kWindowAxes], stride[kWindowAxes],
      dilation[kWindowAxes];
  int64_t pad[kWindowAxes];  // before the image
  int64_t end[kWindowAxes];  // after the image

  int64_t in_size() const { return in[0] * in[1] * in[2]; }
  int64_t out_size() const { return out[0] * out[1] * out[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// pads: all begins, then all ends.
inline Window window_of(const Tensor& y, const Tensor& x, const Ints& kernel, const Ints& strides,
                        const Ints& dilations, const Ints& pads) {
  Window g;
  const int n = x.rank - 2;
  for (int i = 0; i < kWindowAxes; ++i) {
    const int from = i - kWindowAxes + n;
    const bool there = from >= 0;
    g.in[i] = there ? x.shape[2 + from] : 1;
    g.out[i] = there ? y.shape[2 + from] : 1;
    g.kernel[i] = there ? kernel[from] : 1;
    g.stride[i] = there ? strides[from] : 1;
    g.dilation[i] = there ? dilations[from] : 1;
    g.pad[i] = there ? pads[from] : 0;
    g.end[i] = there ? pads[from + n] : 0;
  }
  return g;
}

inline Ints sizes_of(const Tensor& t, int first) {
  Ints list = {};
  list.n = t.rank > first ? t.rank - first : 0;
  for (int i = 0; i < list.n; ++i) list.v[i] = t.shape[first + i];
  return list;
}

// Places i in [low, high) for which origin + i step lies in [0, size). step > 0.
struct Inside {
  int64_t low, high;
  Inside(int64_t origin, int64_t step, int64_t size, int64_t n)
      : low(origin >= 0 ? 0 : (-origin + step - 1) / step),
        high(min(n, floordiv(size - origin + step - 1, step))) {}
};

}  // namespace
}  // namespace qg
