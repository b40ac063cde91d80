// Matrix products of any type: y = a b over broadcast batches, and what is done with the sums.
#pragma once
#include <type_traits>

#include "sums.h"

namespace qg {
namespace {

constexpr int kProductRows = 4;
constexpr int kProductColumns = 16;

// y[batch][m][n] = a[batch][m][k] b[batch][k][n]; vectors are matrices of one row or column.
struct MatrixProduct {
  Tensor batch;  // the axes before the matrices; without data
  int64_t m, n, k;
  Strides a_batch, b_batch;      // elements from one matrix to the next, by axis of batch
  int64_t a_row, a_k, b_k, b_n;  // elements from one entry to the next
  bool good;

  int64_t batches() const { return batch.size(); }
};

// The axes of a before its last `kept`, without data.
inline Tensor leading_axes(const Tensor& t, int kept) {
  Tensor r = t;
  r.rank = t.rank > kept ? t.rank - kept : 0;
  return r;
}

inline MatrixProduct matrix_product(const Tensor& y, const Tensor& a, const Tensor& b) {
  MatrixProduct p = {};
  p.m = a.rank > 1 ? a.shape[a.rank - 2] : 1;
  p.k = a.shape[a.rank - 1];
  p.n = b.rank > 1 ? b.shape[b.rank - 1] : 1;
  p.a_row = p.k;
  p.a_k = 1;
  p.b_k = p.n;
  p.b_n = 1;
  const Tensor a_axes = leading_axes(a, 2), b_axes = leading_axes(b, 2);
  p.batch = leading_axes(y, (a.rank > 1) + (b.rank > 1));
  p.good = p.k == b.shape[b.rank > 1 ? b.rank - 2 : 0] && p.batch.rank >= a_axes.rank &&
           p.batch.rank >= b_axes.rank && p.batches() * p.m * p.n == y.size();
  if (!p.good) return p;
  p.a_batch = broadcast_strides(a_axes, p.batch);
  p.b_batch = broadcast_strides(b_axes, p.batch);
  for (int i = 0; i < p.batch.rank; ++i) {
    const int ai = i - p.batch.rank + a_axes.rank, bi = i - p.batch.rank + b_axes.rank;
    p.good = p.good && (ai < 0 || a_axes.shape[ai] == 1 || a_axes.shape[ai] == p.batch.shape[i]) &&
             (bi < 0 || b_axes.shape[bi] == 1 || b_axes.shape[bi] == p.batch.shape[i]);
    p.a_batch.v[i] *= p.m * p.k;
    p.b_batch.v[i] *= p.k * p.n;
  }
  return p;
}

// A zero point or scale of a matrix [.., M, N] by tensor, by row ([M] or [.., M, 1]) or by column
// ([N] or [.., 1, N]).
struct MatrixParameter {
  Tensor t;
  Strides batch;
  int64_t row, column;

  MatrixParameter(const Tensor& given, bool rows, const MatrixProduct& p)
      : t(given), batch{}, row(0), column(0) {
    if (!t || t.size() == 1) return;
    if (t.rank == 1) {
      (rows ? row : column) = 1;
      return;
    }
    batch = broadcast_strides(leading_axes(t, 2), p.batch);
    const int64_t n_rows = t.shape[t.rank - 2], n_columns = t.shape[t.rank - 1];
    for (int i = 0; i < p.batch.rank; ++i) batch.v[i] *= n_rows * n_columns;
    row = n_rows != 1 ? n_columns : 0;
    column = n_columns != 1 ? 1 : 0;
  }
  bool fits(bool rows, const MatrixProduct& p) const {
    if (!t || t.size() == 1) return true;
    const int64_t wanted = rows ? p.m : p.n;
    if (t.rank == 1) return t.shape[0] == wanted;
    if (t.rank - 2 > p.batch.rank) return false;
    for (int i = 0; i + 2 < t.rank; ++i) {
      if (t.shape[i] != 1 && t.shape[i] != p.batch.shape[p.batch.rank - t.rank + 2 + i])
        return false;
    }
    const int64_t along = t.shape[t.rank - (rows ? 2 : 1)],
                  across = t.shape[t.rank - (rows ? 1 : 2)];
    return across == 1 && (along == 1 || along == wanted);
  }
  template <class T>
  compute_t<T> at(const Index& i, int rank, int64_t r, int64_t c) const {
    if (!t) return 0;
    return static_cast<compute_t<T>>(t.as<T>()[i.offset(batch, rank) + r * row + c * column]);
  }
};

// acc[i][j] += sum over k of (a[i][k] - a_zero[i]) (b[k][j] - b_zero[j]) for R rows and n columns.
template <bool kZeros, int R, class A, class B, class Sum>
inline void product_block(Sum (&acc)[kProductRows][kProductColumns], const MatrixProduct& p,
                          int64_t n, const A* a, const Sum* a_zero, const B* b, const Sum* b_zero) {
  Sum row[kProductColumns] = {};
  for (int64_t k = 0; k < p.k; ++k) {
    const B* from = b + k * p.b_k;
    if (n == kProductColumns && p.b_n == 1) {
      for (int j = 0; j < kProductColumns; ++j) row[j] = static_cast<Sum>(from[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) row[j] = static_cast<Sum>(from[j * p.b_n]);
    }
    if constexpr (kZeros) {
      for (int j = 0; j < kProductColumns; ++j) row[j] -= b_zero[j];
    }
    for (int i = 0; i < R; ++i) {
      Sum x = static_cast<Sum>(a[i * p.a_row + k * p.a_k]);
      if constexpr (kZeros) x -= a_zero[i];
      for (int j = 0; j < kProductColumns; ++j) acc[i][j] += x * row[j];
    }
  }
}

// All sums of a product; out(at, batch, row, column, sums, n) takes n neighbours of a row. at is
// the index of the batch.
template <bool kZeros, class A, class B, class Sum, class AZero, class BZero, class Out>
inline void product_sums(const Context& c, const MatrixProduct& p, const A* a, const B* b,
                         const AZero& a_zero, const BZero& b_zero, const Out& out) {
  const int64_t blocks = (p.m + kProductRows - 1) / kProductRows;
  const int64_t chunks = (p.n + kProductColumns - 1) / kProductColumns;
  const int64_t total = p.batches() * blocks * chunks;
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    const int64_t column = item % chunks * kProductColumns;
    const int64_t row = item / chunks % blocks * kProductRows;
    const int64_t batch = item / chunks / blocks;
    const int64_t n = min(kProductColumns, p.n - column), m = min(kProductRows, p.m - row);
    const Index at(batch, p.batch);
    const A* from = a + at.offset(p.a_batch, p.batch.rank) + row * p.a_row;
    const B* with = b + at.offset(p.b_batch, p.batch.rank) + column * p.b_n;
    Sum acc[kProductRows][kProductColumns] = {};
    Sum az[kProductRows] = {}, bz[kProductColumns] = {};
    if constexpr (kZeros) {
      for (int64_t i = 0; i < m; ++i) az[i] = a_zero(at, row + i);
      for (int64_t j = 0; j < n; ++j) bz[j] = b_zero(at, column + j);
    }
    if (m == kProductRows) {
      product_block<kZeros, kProductRows>(acc, p, n, from, az, with, bz);
      for (int i = 0; i < kProductRows; ++i) out(at, batch, row + i, column, acc[i], n);
    } else {
      for (int64_t i = 0; i < m; ++i) {
        Sum one[kProductRows][kProductColumns] = {};
        product_block<kZeros, 1>(one, p, n, from + i * p.a_row, az + i, with, bz);
        out(at, batch, row + i, column, one[0], n);
      }
    }
  }
}

template <class Sum>
struct NoZero {
  Sum operator()(const Index&, int64_t) const { return 0; }
};

template <class T>
inline void matmul(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b,
                   const char* wrong) {
  using Sum = sum_t<T>;
  const MatrixProduct p = matrix_product(y, a, b);
  if (!p.good) return c.fail(wrong);
  product_sums<false, T, T, Sum>(
      c, p, a.as<T>(), b.as<T>(), NoZero<Sum>{}, NoZero<Sum>{},
      [&](const Index&, int64_t batch, int64_t row, int64_t column, const Sum* sums, int64_t n) {
        T* to = y.as<T>() + (batch * p.m + row) * p.n + column;
        for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(sums[j]);
      });
}

// y = alpha a b + beta z, with a and b transposed if asked.
template <class T>
inline void gemm(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b,
                 const Tensor& z, double alpha, double beta, bool a_turned, bool b_turned,
                 const char* wrong) {
  using Sum = sum_t<T>;
  MatrixProduct p = {};
  p.m = a.shape[a_turned];
  p.k = a.shape[!a_turned];
  p.n = b.shape[!b_turned];
  p.a_row = a_turned ? 1 : p.k;
  p.a_k = a_turned ? p.m : 1;
  p.b_k = b_turned ? 1 : p.n;
  p.b_n = b_turned ? p.k : 1;
  bool good = p.k == b.shape[b_turned] && z.rank <= 2;
  for (int i = 0; good && i < z.rank; ++i) {
    const int64_t size = y.shape[2 - z.rank + i];
    good = z.shape[i] == 1 || z.shape[i] == size;
  }
  if (!good) return c.fail(wrong);
  const Strides zs = broadcast_strides(z, y);
  const auto scaled = [](Sum x, double factor) {
    using Number = std::conditional_t<std::is_integral_v<T>, T, Sum>;  // with the sign of T
    using Real = std::conditional_t<std::is_integral_v<T>, double, Sum>;
    const Number n = static_cast<Number>(x);
    return factor == 1 ? x
                       : static_cast<Sum>(
                             static_cast<Number>(static_cast<Real>(n) * static_cast<Real>(factor)));
  };
  product_sums<false, T, T, Sum>(
      c, p, a.as<T>(), b.as<T>(), NoZero<Sum>{}, NoZero<Sum>{},
      [&](const Index&, int64_t, int64_t row, int64_t column, const Sum* sums, int64_t n) {
        T* to = y.as<T>() + row * p.n + column;
        for (int64_t j = 0; j < n; ++j) {
          Sum sum = scaled(sums[j], alpha);
          if (z && beta != 0) {
            const T* from = z.as<T>() + row * zs[0] + (column + j) * zs[1];
            sum += scaled(static_cast<Sum>(*from), beta);
          }
          to[j] = static_cast<T>(sum);
        }
      });
}

// Exact integer products of 8-bit numbers without their zero points; out gets the sums.
template <class A, class B, class Out>
inline void code_product(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b,
                         const Tensor& a_zero, const Tensor& b_zero, const char* wrong,
                         const Out& out) {
  const MatrixProduct p = matrix_product(y, a, b);
  if (!p.good) return c.fail(wrong);
  const MatrixParameter az(a_zero, true, p), bz(b_zero, false, p);
  if (!az.fits(true, p) || !bz.fits(false, p)) return c.fail(wrong);
  const int rank = p.batch.rank;
  product_sums<true, A, B, uint32_t>(
      c, p, a.as<A>(), b.as<B>(),
      [&](const Index& at, int64_t row) {
        return static_cast<uint32_t>(az.template at<A>(at, rank, row, 0));
      },
      [&](const Index& at, int64_t column) {
        return static_cast<uint32_t>(bz.template at<B>(at, rank, 0, column));
      },
      [&](const Index& at, int64_t batch, int64_t row, int64_t column, const uint32_t* sums,
          int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
          out(p, at, (batch * p.m + row) * p.n + column + j, row, column + j,
              static_cast<int32_t>(sums[j]));
        }
      });
}

template <class A, class B>
inline void matmul_integer(const Context& c, const Tensor& y, const Tensor& a, const Tensor& b,
                           const Tensor& a_zero, const Tensor& b_zero, const char* wrong) {
  code_product<A, B>(c, y, a, b, a_zero, b_zero, wrong,
                     [&](const MatrixProduct&, const Index&, int64_t to, int64_t, int64_t,
                         int32_t sum) { y.as<int32_t>()[to] = sum; });
}

// The codes of (a - a_zero) a_scale (b - b_zero) b_scale.
template <class A, class B, class Y, class S>
inline void qlinear_matmul(const Context& c, const Tensor& y, const Tensor& a,
                           const Tensor& a_scale, const Tensor& a_zero, const Tensor& b,
                           const Tensor& b_scale, const Tensor& b_zero, const Tensor& y_scale,
                           const Tensor& y_zero, const char* wrong) {
  const MatrixProduct shape = matrix_product(y, a, b);
  if (!shape.good) return c.fail(wrong);
  const MatrixParameter as(a_scale, true, shape), bs(b_scale, false, shape),
      ys(y_scale, true, shape), yz(y_zero, true, shape);
  if (!as.fits(true, shape) || !bs.fits(false, shape) || !ys.fits(true, shape) ||
      !yz.fits(true, shape)) {
    return c.fail(wrong);
  }
  code_product<A, B>(
      c, y, a, b, a_zero, b_zero, wrong,
      [&](const MatrixProduct& p, const Index& at, int64_t to, int64_t row, int64_t column,
          int32_t sum) {
        const int rank = p.batch.rank;
        // rounded as the type of the scales
        const S product = static_cast<S>(as.template at<S>(at, rank, row, 0) *
                                         bs.template at<S>(at, rank, 0, column));
        const S factor = static_cast<S>(static_cast<float>(product) /
                                        static_cast<float>(ys.template at<S>(at, rank, row, 0)));
        y.as<Y>()[to] = code_of<Y>(sum * static_cast<double>(static_cast<float>(factor)),
                                   yz.template at<Y>(at, rank, row, 0));
      });
}

// -- einsum ---------------------------------------------------------------------------------------

// Operands by one letter an axis, `ab,bc->ac`; axes of size 1 are broadcast.
template <class T, int N>
inline void einsum(const Context& c, const Tensor& y, const Tensor (&x)[N], const char* equation,
                   const char* wrong) {
  using Sum = sum_t<T>;
  constexpr int kLetters = 26;
  int64_t extent[kLetters];
  Strides strides[N];  // by letter: of the axes of `order`
  int64_t by_letter[N][kLetters] = {};
  for (int i = 0; i < kLetters; ++i) extent[i] = -1;
  bool good = true;
  const char* at = equation;
  for (int operand = 0; operand < N; ++operand) {
    const Strides dense = strides_of(x[operand]);
    for (int axis = 0; *at >= 'a' && *at <= 'z'; ++at, ++axis) {
      const int letter = *at - 'a';
      const int64_t size = x[operand].shape[axis];
      if (size != 1) by_letter[operand][letter] += dense[axis];
      if (extent[letter] < 0 || extent[letter] == 1) {
        extent[letter] = size;
      } else {
        good = good && (size == 1 || size == extent[letter]);
      }
    }
    ++at;  // the comma, or the minus
  }
  // the axes: those of y, then those that are summed over
  Tensor order = {};
  int letters[kLetters];
  int n_letters = 0;
  bool used[kLetters] = {};
  for (++at; *at; ++at) {
    used[*at - 'a'] = true;
    letters[n_letters++] = *at - 'a';
  }
  for (int i = 0; i < y.rank && i < n_letters; ++i) good = good && y.shape[i] == extent[letters[i]];
  if (!good) return c.fail(wrong);
  const int n_outer = n_letters;
  for (int i = 0; i < kLetters; ++i) {
    if (extent[i] >= 0 && !used[i]) letters[n_letters++] = i;
  }
  // summed axes as a tensor of their own; more than kMaxRank of them are refused when compiling
  order.rank = n_letters - n_outer;
  for (int i = n_outer; i < n_letters; ++i) order.shape[i - n_outer] = extent[letters[i]];
  for (int operand = 0; operand < N; ++operand) {
    strides[operand] = Strides{};
    for (int i = n_outer; i < n_letters; ++i)
      strides[operand].v[i - n_outer] = by_letter[operand][letters[i]];
  }
  const int inner = order.rank - 1;
  const int64_t n_inner = inner >= 0 ? order.shape[inner] : 1;
  const int64_t n_sums = n_inner ? order.size() / n_inner : 0;
  const int64_t total = y.size(), first = c.begin(total), last = c.end(total);
  if (first >= last) return;
  Index out(first, y);
  for (int64_t item = first; item < last; ++item, out.advance(y)) {
    const T* base[N];
    for (int operand = 0; operand < N; ++operand) {
      int64_t o = 0;
      for (int i = 0; i < n_outer; ++i) o += out.v[i] * by_letter[operand][letters[i]];
      base[operand] = x[operand].template as<T>() + o;
    }
    Sum sum = 0;
    Tensor rows = order;
    rows.rank = inner >= 0 ? inner : 0;
    Index row(0, rows);
    for (int64_t s = 0; s < n_sums; ++s, row.advance(rows)) {
      const T* from[N];
      int64_t step[N];
      bool dense = true;
      for (int operand = 0; operand < N; ++operand) {
        from[operand] = base[operand] + row.offset(strides[operand], rows.rank);
        step[operand] = inner >= 0 ? strides[operand][inner] : 0;
        dense = dense && step[operand] == 1;
      }
      const auto term = [&](int64_t i, const int64_t* steps) {
        Sum product = static_cast<Sum>(from[0][i * steps[0]]);
        for (int operand = 1; operand < N; ++operand)
          product *= static_cast<Sum>(from[operand][i * steps[operand]]);
        return product;
      };
      if (dense) {
        int64_t ones[N];
        for (int operand = 0; operand < N; ++operand) ones[operand] = 1;
        sum += sum_terms<Sum>(n_inner, [&](int64_t i) { return term(i, ones); });
      } else {
        for (int64_t i = 0; i < n_inner; ++i) sum += term(i, step);
      }
    }
    y.as<T>()[item] = static_cast<T>(sum);
  }
}

// -- weights of a few bits ------------------------------------------------------------------------

// y = a w + bias with w[n][k] = (code - zero) scale by blocks of `size` along k: com.microsoft
// MatMulNBits. Z is uint8_t (packed codes) or the type of the zeros; absent zeros are 2^(bits-1).
template <class T, class S, class Z>
inline void matmul_nbits(const Context& c, const Tensor& y, const Tensor& a, const Tensor& codes,
                         const Tensor& scales, const Tensor& zeros, const Tensor& groups,
                         const Tensor& bias, int64_t k, int64_t n, int bits, int64_t size,
                         const char* wrong) {
  constexpr int kRows = 8, kChunk = 64;
  using Sum = compute_t<T>;
  const int64_t blocks = (k + size - 1) / size, block_bytes = (size * bits + 7) / 8,
                zero_bytes = (blocks * bits + 7) / 8;
  constexpr bool kPacked = std::is_same_v<Z, uint8_t>;
  const int64_t n_zeros = n * (kPacked ? zero_bytes : blocks);
  if (a.rank < 1 || a.shape[a.rank - 1] != k || codes.size() != n * blocks * block_bytes ||
      scales.size() != n * blocks || (zeros && zeros.size() != n_zeros) ||
      (groups && groups.size() < k) || (bias && bias.size() != n)) {
    return c.fail(wrong);
  }
  const int64_t m = a.count(0, a.rank - 1), per = 8 / bits;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t column = c.begin(n); column < c.end(n); ++column) {
    const uint8_t* code = codes.as<uint8_t>() + column * blocks * block_bytes;
    const auto zero = [&](int64_t block) -> float {
      if (!zeros) return static_cast<float>(1u << (bits - 1));
      if constexpr (kPacked) {
        return static_cast<float>(
            zeros.as<uint8_t>()[column * zero_bytes + block / per] >> block % per * bits & mask);
      } else {
        return static_cast<float>(zeros.as<Z>()[column * blocks + block]);
      }
    };
    const S* scale = scales.as<S>() + column * blocks;
    for (int64_t row = 0; row < m; row += kRows) {
      const int64_t rows = min(kRows, m - row);
      Sum sums[kRows] = {};
      for (int64_t first = 0; first < k;) {
        float w[kChunk];
        const int64_t block = first / size, begin = first - block * size;
        const int64_t count = min(kChunk, min(size - begin, k - first));
        const uint8_t* from = code + block * block_bytes;
        const float z = zero(block), s = static_cast<float>(scale[block]);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t j = begin + i;
          const float q = static_cast<float>(from[j / per] >> j % per * bits & mask);
          if (groups) {
            const int64_t g = groups.as<int32_t>()[first + i];
            if (g < 0 || g >= blocks) return c.fail(wrong);
            w[i] = (q - zero(g)) * static_cast<float>(scale[g]);
          } else {
            w[i] = (q - z) * s;
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          const T* x = a.as<T>() + (row + r) * k + first;
          sums[r] += sum_terms<Sum>(
              count, [&](int64_t i) { return static_cast<Sum>(x[i]) * static_cast<Sum>(w[i]); });
        }
        first += count;
      }
      const Sum start = bias ? static_cast<Sum>(bias.as<T>()[column]) : Sum(0);
      for (int64_t r = 0; r < rows; ++r)
        y.as<T>()[(row + r) * n + column] = static_cast<T>(sums[r] + start);
    }
  }
}

// -- determinants ---------------------------------------------------------------------------------

// Of square matrices, by elimination in `work`, which has the shape of x.
template <class T>
inline void det(const Context& c, const Tensor& y, const Tensor& work, const Tensor& x,
                const char* wrong) {
  using Sum = compute_t<T>;
  const int64_t n = x.shape[x.rank - 1], total = x.count(0, x.rank - 2);
  if (x.shape[x.rank - 2] != n) return c.fail(wrong);
  for (int64_t item = c.begin(total); item < c.end(total); ++item) {
    Sum* a = work.as<Sum>() + item * n * n;
    for (int64_t i = 0; i < n * n; ++i) a[i] = static_cast<Sum>(x.as<T>()[item * n * n + i]);
    Sum result = 1;
    for (int64_t k = 0; k < n; ++k) {
      int64_t best = k;
      for (int64_t i = k + 1; i < n; ++i) {
        if (__builtin_fabs(a[i * n + k]) > __builtin_fabs(a[best * n + k])) best = i;
      }
      const Sum pivot = a[best * n + k];
      result *= best == k ? pivot : -pivot;
      if (pivot == Sum(0)) break;
      for (int64_t j = k; best != k && j < n; ++j) {
        const Sum kept = a[k * n + j];
        a[k * n + j] = a[best * n + j];
        a[best * n + j] = kept;
      }
      for (int64_t i = k + 1; i < n; ++i) {
        const Sum factor = a[i * n + k] / pivot;
        for (int64_t j = k + 1; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
      }
    }
    y.as<T>()[item] = static_cast<T>(result);
  }
}

}  // namespace
}  // namespace qg
