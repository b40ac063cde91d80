// Calls of the generated kernels for products and convolutions: their arguments from tensors.
#pragma once
#include "gemm.h"
#include "tensor.h"

namespace qg {
namespace {

using GemmKernel = void (*)(const GemmArgs&, int, int);
using DepthwiseKernel = void (*)(const DepthwiseArgs&, int, int);
using PadKernel = void (*)(const PadArgs&, int, int);
using QuantizeRowsKernel = void (*)(const QuantizeRowsArgs&, int, int);

// What a product reads besides x and its weights; absent tensors are not needed.
struct Epilogue {
  Tensor bias, scale, zero, x_scale, x_zero;
  Tensor in[4];
  Ints full;  // whether in[i] has a value for each output
  float y_scale;
  int32_t y_zero;
};

// y is [images][rows][columns][n]. A static zero is where sums start, else it is the sums of weights.
inline GemmOutput output_of(const Tensor& y, int64_t images, int64_t rows, int64_t columns, int64_t n, const Epilogue& e) {
  (void)images;
  GemmOutput out = {};
  out.y = y.data;
  out.y_pixel = n;
  out.y_row = columns * n;
  out.y_image = rows * columns * n;
  out.bias = e.bias.as<float>();
  out.scale = e.scale.as<float>();
  if (e.x_scale) {
    out.wsum = e.zero.as<int32_t>();
    out.x_scale = e.x_scale.as<float>();
    out.x_zero = e.x_zero.as<int32_t>();
    out.x_scale_step = e.x_scale.size() > 1;
  } else {
    out.init = e.zero.as<int32_t>();
    out.x_zero = e.x_zero.as<int32_t>();  // for depthwise kernels
  }
  out.y_scale = e.y_scale;
  out.y_zero = e.y_zero;
  for (int i = 0; i < 4; ++i) {
    const bool full = i < e.full.n && e.full[i];
    out.in[i] = {e.in[i].as<float>(), full ? n : 0, full ? out.y_row : 0, full ? out.y_image : 0};
  }
  return out;
}

// y[.., n] of x[.., k]; a step is 4 bytes of x.
inline void run_product(const Context& c, GemmKernel kernel, const Tensor& y, const Tensor& x, const Tensor& w, int64_t n, int64_t steps, int64_t row_block, const Epilogue& e) {
  const int64_t m = y.count(0, y.rank - 1);
  if (m == 0) return;
  GemmArgs a = {};
  a.w = w.as<uint8_t>();
  a.row_block = row_block;
  a.x = x.as<uint8_t>();
  a.x_pixel = 4 * steps;
  a.columns = static_cast<int32_t>(m);
  a.rows = a.images = 1;
  a.n_taps = 1;
  a.steps = static_cast<int32_t>(steps);
  a.n = static_cast<int32_t>(n);
  a.out = output_of(y, 1, 1, m, n, e);
  kernel(a, c.thread, c.threads);
}

// NHWC; x has its borders already. Groups are products of their own, one after the other.
inline void run_convolution(const Context& c, GemmKernel kernel, const Tensor& y, const Tensor& x, const Tensor& w, int64_t n, int64_t steps, int64_t row_block, int64_t x_bytes, const Ints& window, const Ints& strides, const Ints& dilations, int64_t groups, const Epilogue& e) {
  if (y.size() == 0) return;
  const int64_t channels = x.shape[3] * x_bytes, row = x.shape[2] * channels;
  int32_t taps[256];
  int n_taps = 0;
  for (int64_t i = 0; i < window[0]; ++i) {
    for (int64_t j = 0; j < window[1]; ++j) {
      taps[n_taps++] = static_cast<int32_t>(i * dilations[0] * row + j * dilations[1] * channels);
    }
  }
  const int64_t per_group = n / groups;
  for (int64_t g = 0; g < groups; ++g) {
    GemmArgs a = {};
    a.w = w.as<uint8_t>() + g * ((per_group + 15) / 16) * row_block;
    a.row_block = row_block;
    a.x = x.as<uint8_t>() + g * (channels / groups);
    a.x_pixel = strides[1] * channels;
    a.x_row = strides[0] * row;
    a.x_image = x.shape[1] * row;
    a.columns = static_cast<int32_t>(y.shape[2]);
    a.rows = static_cast<int32_t>(y.shape[1]);
    a.images = static_cast<int32_t>(y.shape[0]);
    a.taps = taps;
    a.n_taps = n_taps;
    a.steps = static_cast<int32_t>(steps);
    a.n = static_cast<int32_t>(per_group);
    a.out = output_of(y, y.shape[0], y.shape[1], y.shape[2], n, e);
    if (g > 0) {
      const int64_t first = g * per_group;
      a.out.y = static_cast<float*>(a.out.y) + first;
      if (a.out.bias) a.out.bias += first;
      for (GemmInput& in : a.out.in) {
        if (in.p) in.p += first;
      }
    }
    kernel(a, c.thread, c.threads);
  }
}

inline void run_depthwise(const Context& c, DepthwiseKernel kernel, const Tensor& y, const Tensor& x, const Tensor& w, const Ints& window, const Ints& strides, const Ints& dilations, const Ints& pads, const Epilogue& e) {
  if (y.size() == 0) return;
  DepthwiseArgs a = {};
  a.w = w.as<float>();
  a.x = x.data;
  a.x_pixel = x.shape[3];
  a.x_row = x.shape[2] * a.x_pixel;
  a.x_image = x.shape[1] * a.x_row;
  a.h = static_cast<int32_t>(x.shape[1]);
  a.width = static_cast<int32_t>(x.shape[2]);
  a.channels = static_cast<int32_t>(x.shape[3]);
  a.columns = static_cast<int32_t>(y.shape[2]);
  a.rows = static_cast<int32_t>(y.shape[1]);
  a.images = static_cast<int32_t>(y.shape[0]);
  a.kernel_h = static_cast<int32_t>(window[0]);
  a.kernel_w = static_cast<int32_t>(window[1]);
  a.stride_h = static_cast<int32_t>(strides[0]);
  a.stride_w = static_cast<int32_t>(strides[1]);
  a.dilation_h = static_cast<int32_t>(dilations[0]);
  a.dilation_w = static_cast<int32_t>(dilations[1]);
  a.pad_top = static_cast<int32_t>(pads[0]);
  a.pad_left = static_cast<int32_t>(pads[1]);
  a.out = output_of(y, y.shape[0], y.shape[1], y.shape[2], y.shape[3], e);
  kernel(a, c.thread, c.threads);
}

// pads: top, left, bottom, right
inline PadArgs pad_args(const Tensor& y, const Tensor& x, const Ints& pads) {
  PadArgs a = {};
  a.x = x.data;
  a.x_channel = 1;
  a.x_pixel = x.shape[3];
  a.x_row = x.shape[2] * a.x_pixel;
  a.x_image = x.shape[1] * a.x_row;
  a.channels = static_cast<int32_t>(x.shape[3]);
  a.columns = static_cast<int32_t>(x.shape[2]);
  a.rows = static_cast<int32_t>(x.shape[1]);
  a.images = static_cast<int32_t>(x.shape[0]);
  a.y = y.data;
  a.y_channels = static_cast<int32_t>(y.shape[3]);
  a.top = static_cast<int32_t>(pads[0]);
  a.left = static_cast<int32_t>(pads[1]);
  a.bottom = static_cast<int32_t>(pads[2]);
  a.right = static_cast<int32_t>(pads[3]);
  return a;
}

inline void run_pad(const Context& c, PadKernel kernel, const Tensor& y, const Tensor& x, const Ints& pads, double scale, int64_t zero) {
  PadArgs a = pad_args(y, x, pads);
  a.scale = static_cast<float>(scale);
  a.zero = static_cast<int32_t>(zero);
  kernel(a, c.thread, c.threads);
}

// The rows of a matrix as the rows of an image of one column, so that they are shared by the threads.
inline PadArgs row_args(const Tensor& y, const Tensor& x) {
  PadArgs a = {};
  a.x = x.data;
  a.x_channel = 1;
  a.channels = static_cast<int32_t>(x.shape[x.rank - 1]);
  a.x_pixel = a.channels;
  a.columns = 1;
  a.x_row = a.channels;
  a.rows = static_cast<int32_t>(x.count(0, x.rank - 1));
  a.x_image = a.rows * a.x_row;
  a.images = 1;
  a.y = y.data;
  a.y_channels = static_cast<int32_t>(y.shape[y.rank - 1]);
  return a;
}

inline void run_convert_rows(const Context& c, PadKernel kernel, const Tensor& y, const Tensor& x) {
  kernel(row_args(y, x), c.thread, c.threads);
}

inline void run_quantize_tensor(const Context& c, PadKernel extremes, PadKernel quantize, const Tensor& y, const Tensor& scale, const Tensor& zero, const Tensor& partials, const Tensor& x) {
  PadArgs a = row_args(y, x);
  a.partials = partials.as<float>();
  a.scale_out = scale.as<float>();
  a.zero_out = zero.as<int32_t>();
  extremes(a, c.thread, c.threads);
  c.wait();
  quantize(a, c.thread, c.threads);
}

inline void run_quantize_image(const Context& c, PadKernel extremes, PadKernel quantize, const Tensor& y, const Tensor& scale, const Tensor& zero, const Tensor& partials, const Tensor& x, const Ints& pads) {
  PadArgs a = pad_args(y, x, pads);
  a.partials = partials.as<float>();
  a.scale_out = scale.as<float>();
  a.zero_out = zero.as<int32_t>();
  extremes(a, c.thread, c.threads);
  c.wait();
  quantize(a, c.thread, c.threads);
}

inline void run_quantize_rows(const Context& c, QuantizeRowsKernel kernel, const Tensor& y, const Tensor& scale, const Tensor& zero, const Tensor& x) {
  QuantizeRowsArgs a = {};
  a.x = x.as<float>();
  a.k = static_cast<int32_t>(x.shape[x.rank - 1]);
  a.x_stride = a.k;
  a.m = static_cast<int32_t>(x.count(0, x.rank - 1));
  a.y = y.as<uint8_t>();
  a.k_padded = static_cast<int32_t>(y.shape[y.rank - 1]);
  a.y_stride = a.k_padded;
  a.scale = scale.as<float>();
  a.zero = zero.as<int32_t>();
  kernel(a, c.thread, c.threads);
}

}  // namespace
}  // namespace qg
