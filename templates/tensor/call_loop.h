// Calls of the generated elementwise loops: their arguments from tensors.
#pragma once
#include "loop.h"
#include "tensor.h"

namespace qg {
namespace {

using LoopKernel = void (*)(const LoopArgs&, int, int);

// y = chain(x..), operands broadcast to y.
template <int N>
inline void run_loop(const Context& c, LoopKernel kernel, const Tensor& y, const Tensor (&x)[N]) {
  LoopArgs a = {};
  a.rank = y.rank;
  for (int i = 0; i < y.rank; ++i) a.shape[i] = y.shape[i];
  for (int j = 0; j < N; ++j) {
    a.in[j] = x[j].data;
    const Strides strides = broadcast_strides(x[j], y);
    for (int i = 0; i < y.rank; ++i) a.in_stride[j][i] = strides[i];
  }
  a.out[0] = y.data;
  kernel(a, c.thread, c.threads);
}

}  // namespace
}  // namespace qg
