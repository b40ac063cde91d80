// Calls of the matrix kernels of formats of the catalog: their arguments from tensors.
#pragma once
#include "ops.h"
#include "tensor.h"

namespace qg {
namespace {

using FormatKernel = void (*)(const MatmulArgs&, int, int);
using FormatRowsKernel = void (*)(const RowsArgs&, int, int, int);

// y[.., n] of rows of `stride` bytes; the threads share the row-blocks of W.
inline void run_format_product(const Context& c, FormatKernel kernel, const Tensor& y, const Tensor& rows, const Tensor& w, const Tensor& bias, int64_t blocks, int64_t kblocks, int64_t row_block, int64_t stride, int64_t scale, int64_t zero, int64_t sum) {
  MatmulArgs a = {};
  a.w = w.as<uint8_t>();
  a.row_block = row_block;
  a.kblocks = static_cast<int32_t>(kblocks);
  a.m = static_cast<int32_t>(y.count(0, y.rank - 1));
  a.n = static_cast<int32_t>(y.shape[y.rank - 1]);
  a.x = rows.as<uint8_t>();
  a.x_stride = stride;
  a.scale_offset = static_cast<int32_t>(scale);
  a.zero_offset = static_cast<int32_t>(zero);
  a.sum_offset = static_cast<int32_t>(sum);
  a.y = y.as<float>();
  a.y_stride = a.n;
  a.bias = bias.as<float>();
  const int first = static_cast<int>(c.begin(blocks)), last = static_cast<int>(c.end(blocks));
  if (a.m > 0 && first < last) kernel(a, first, last);
}

// Each correction is (offset, segment, zero).
inline void run_format_rows(const Context& c, FormatRowsKernel kernel, const Tensor& y, const Tensor& x, int64_t k, int64_t padded, int64_t scale, bool token_scale, const Ints& first, const Ints& second, int64_t corrections) {
  RowsArgs a = {};
  a.x = x.as<float>();
  a.x_stride = k;
  a.k = static_cast<int32_t>(k);
  a.k_padded = static_cast<int32_t>(padded);
  a.out = y.as<uint8_t>();
  a.out_stride = y.shape[1];
  a.scale_offset = static_cast<int32_t>(scale);
  a.token_scale = token_scale;
  a.top = 127.0f;
  a.n_corrections = static_cast<int32_t>(corrections);
  const Ints* given[] = {&first, &second};
  for (int i = 0; i < corrections; ++i) {
    const Ints& v = *given[i];
    a.corrections[i] = {static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1]), static_cast<int32_t>(v[2])};
  }
  const int m = static_cast<int>(x.count(0, x.rank - 1));
  kernel(a, static_cast<int>(c.begin(m)), static_cast<int>(c.end(m)), m);
}

}  // namespace
}  // namespace qg
