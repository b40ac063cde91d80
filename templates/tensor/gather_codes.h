// Rows of a table of int8 codes with a scale by row, as f32.
#pragma once
#include "tensor.h"

namespace qg {
namespace {

// y[.., d] of ids[..]; ids count from the end if negative.
template <class Id>
inline void gather_codes(const Context& c, const Tensor& y, const Tensor& codes, const Tensor& scale, const Tensor& ids, const char* wrong) {
  const int64_t rows = codes.shape[0], width = codes.shape[1], n = ids.size();
  for (int64_t i = c.begin(n); i < c.end(n); ++i) {
    int64_t row = static_cast<int64_t>(ids.as<Id>()[i]);
    row += row < 0 ? rows : 0;
    if (row < 0 || row >= rows) {
      c.fail(wrong);
      row = 0;
    }
    const int8_t* from = codes.as<int8_t>() + row * width;
    const float s = scale.as<float>()[row];
    float* to = y.as<float>() + i * width;
    for (int64_t k = 0; k < width; ++k) to[k] = s * static_cast<float>(from[k]);
  }
}

}  // namespace
}  // namespace qg
