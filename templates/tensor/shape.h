// Sizes: those of tensors as data, and those of views that only the run decides.
#pragma once
#include "tensor.h"

namespace qg {
namespace {

inline void shape_of(const Context& c, const Tensor& y, const Tensor& x, int64_t start, int64_t end) {
  if (c.thread != 0) return;
  for (int64_t i = start; i < end; ++i) y.as<int64_t>()[i - start] = x.shape[i];
}

inline void size_of(const Context& c, const Tensor& y, const Tensor& x) {
  if (c.thread == 0) *y.as<int64_t>() = x.size();
}

// 0 copies a size of x (unless allowed as such), -1 takes what is left.
inline void reshape_sizes(const Context& c, int64_t* sizes, const Tensor& x, const Ints& asked, bool allow_zero, const char* wrong) {
  int64_t others = 1;
  int rest = -1;
  bool good = true;
  for (int i = 0; i < asked.n; ++i) {
    sizes[i] = asked[i];
    if (asked[i] == 0 && !allow_zero) {
      good = good && i < x.rank;
      sizes[i] = i < x.rank ? x.shape[i] : 0;
    }
    if (sizes[i] == -1) {
      good = good && rest < 0;
      rest = i;
    } else {
      good = good && sizes[i] >= 0;
      others *= sizes[i];
    }
  }
  if (rest >= 0) {
    good = good && others != 0 && x.size() % others == 0;
    sizes[rest] = good ? x.size() / others : -1;
  } else {
    good = good && others == x.size();
  }
  if (good) return;
  c.fail(wrong);
  for (int i = 0; i < asked.n; ++i) sizes[i] = -1;
}

inline void squeeze_sizes(const Context&, int64_t* sizes, const Tensor& x, const Ints& axes) {
  for (int i = 0, n = 0; i < x.rank; ++i) {
    bool dropped = false;
    for (int j = 0; j < axes.n; ++j) dropped = dropped || mod(axes[j], x.rank) == i;
    if (!dropped) sizes[n++] = x.shape[i];
  }
}

inline void unsqueeze_sizes(const Context&, int64_t* sizes, const Tensor& x, const Ints& axes) {
  const int rank = x.rank + axes.n;
  for (int i = 0, n = 0; i < rank; ++i) {
    bool added = false;
    for (int j = 0; j < axes.n; ++j) added = added || mod(axes[j], rank) == i;
    sizes[i] = added || n >= x.rank ? 1 : x.shape[n++];
  }
}

}  // namespace
}  // namespace qg
