// Calls of the vector kernels along rows: their arguments from tensors.
#pragma once
#include "rowops.h"
#include "tensor.h"

namespace qg {
namespace {

inline void run_softmax(const Context& c, const Tensor& y, const Tensor& x, bool log) {
  SoftmaxArgs a = {};
  a.x = x.as<float>();
  a.y = y.as<float>();
  a.n = a.x_stride = a.y_stride = x.shape[x.rank - 1];
  a.rows = x.count(0, x.rank - 1);
  a.scale = 1.0f;
  if (a.rows * a.n == 0) return;
  if (log) {
    log_softmax(a, c.thread, c.threads);
  } else {
    softmax(a, c.thread, c.threads);
  }
}

// y = norm(x + residual); with sum, x + residual is a result too.
inline void run_layer_norm(const Context& c, const Tensor& y, const Tensor& sum, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual, double eps) {
  NormArgs a = {};
  a.x = x.as<float>();
  a.residual = residual.as<float>();
  a.y = y.as<float>();
  a.sum = sum.as<float>();
  a.weight = weight.as<float>();
  a.bias = bias.as<float>();
  a.n = a.x_stride = a.residual_stride = a.y_stride = a.sum_stride = x.shape[x.rank - 1];
  a.rows = x.count(0, x.rank - 1);
  a.eps = static_cast<float>(eps);
  if (a.rows * a.n) layer_norm(a, c.thread, c.threads);
}

// Over axes [first, last).
inline void run_reduce(const Context& c, const Tensor& y, const Tensor& x, Reduction kind, int64_t first, int64_t last) {
  ReduceArgs a = {};
  a.x = x.as<float>();
  a.y = y.as<float>();
  a.outer = x.count(0, static_cast<int>(first));
  a.axis = x.count(static_cast<int>(first), static_cast<int>(last));
  a.inner = x.count(static_cast<int>(last), x.rank);
  a.kind = kind;
  reduce(a, c.thread, c.threads);
}

// [outer][a][b][inner] -> [outer][b][a][inner]: where a and b begin and inner begins.
inline void run_swap(const Context& c, const Tensor& y, const Tensor& x, const Ints& axes, int64_t bytes) {
  TransposeArgs a = {};
  a.x = x.data;
  a.y = y.data;
  a.outer = x.count(0, static_cast<int>(axes[0]));
  a.a = x.count(static_cast<int>(axes[0]), static_cast<int>(axes[1]));
  a.b = x.count(static_cast<int>(axes[1]), static_cast<int>(axes[2]));
  a.inner = x.count(static_cast<int>(axes[2]), x.rank);
  a.bytes = static_cast<int32_t>(bytes);
  if (x.size()) transpose(a, c.thread, c.threads);
}

// NHWC; pads are top, left, bottom, right.
inline void run_pool(const Context& c, const Tensor& y, const Tensor& x, bool max, const Ints& window, const Ints& strides, const Ints& dilations, const Ints& pads, bool include_pad) {
  PoolArgs a = {};
  a.x = x.data;
  a.y = y.data;
  a.images = x.shape[0];
  a.h = x.shape[1];
  a.w = x.shape[2];
  a.channels = x.shape[3];
  a.y_h = y.shape[1];
  a.y_w = y.shape[2];
  a.kernel_h = static_cast<int32_t>(window[0]);
  a.kernel_w = static_cast<int32_t>(window[1]);
  a.stride_h = static_cast<int32_t>(strides[0]);
  a.stride_w = static_cast<int32_t>(strides[1]);
  a.dilation_h = static_cast<int32_t>(dilations[0]);
  a.dilation_w = static_cast<int32_t>(dilations[1]);
  a.pad_top = static_cast<int32_t>(pads[0]);
  a.pad_left = static_cast<int32_t>(pads[1]);
  a.pad_bottom = static_cast<int32_t>(pads[2]);
  a.pad_right = static_cast<int32_t>(pads[3]);
  a.count_include_pad = include_pad;
  if (y.size() == 0) return;
  if (max) {
    max_pool(a, c.thread, c.threads);
  } else {
    average_pool(a, c.thread, c.threads);
  }
}

// NHWC; factors: height and width of each x; pads are top, left, bottom, right.
template <int N>
inline void run_join_images(const Context& c, const Tensor& y, const Tensor (&x)[N], const Ints& factors, const Ints& pads) {
  JoinImagesArgs a = {};
  static_assert(N <= sizeof(a.part) / sizeof(a.part[0]), "as many images as the kernel takes");
  a.y = y.as<float>();
  a.images = y.shape[0];
  a.h = y.shape[1] - pads[0] - pads[2];
  a.w = y.shape[2] - pads[1] - pads[3];
  a.channels = y.shape[3];
  a.top = pads[0];
  a.left = pads[1];
  a.bottom = pads[2];
  a.right = pads[3];
  a.n = N;
  for (int i = 0; i < N; ++i) {
    const Tensor& image = x[i];
    a.part[i] = {image.as<float>(), image.shape[3], factors[2 * i], factors[2 * i + 1]};
  }
  if (y.size()) join_images(a, c.thread, c.threads);
}

// y[B, S, heads * head_dim]; q, k and v are columns of their tensors from `offsets` on, the mask is
// broadcast to [B, heads, S, T].
inline void run_attention(const Context& c, const Tensor& y, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, int64_t heads, int64_t head_dim, const Ints& offsets, double scale) {
  EncoderAttentionArgs a = {};
  a.q = q.as<float>() + offsets[0];
  a.k = k.as<float>() + offsets[1];
  a.v = v.as<float>() + offsets[2];
  a.mask = mask.as<float>();
  a.out = y.as<float>();
  a.batch = q.shape[0];
  a.heads = heads;
  a.queries = q.shape[1];
  a.keys = k.shape[1];
  a.head_dim = head_dim;
  a.q_row = q.shape[2];
  a.k_row = k.shape[2];
  a.v_row = v.shape[2];
  a.q_batch = a.queries * a.q_row;
  a.k_batch = a.keys * a.k_row;
  a.v_batch = a.keys * a.v_row;
  a.q_head = a.k_head = a.v_head = a.out_head = head_dim;
  a.k_dim = 1;
  a.out_row = heads * head_dim;
  a.out_batch = a.queries * a.out_row;
  if (mask) {
    Tensor full = {nullptr, 4, {a.batch, heads, a.queries, a.keys}};
    const Strides s = broadcast_strides(mask, full);
    a.mask_batch = s[0];
    a.mask_head = s[1];
    a.mask_row = s[2];
  }
  a.scale = static_cast<float>(scale);
  if (y.size()) encoder_attention(a, c.thread, c.threads);
}

}  // namespace
}  // namespace qg
