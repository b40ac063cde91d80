// The product of the first QIGen (Pegolotti, Frantar, Alistarh and Püschel, "QIGen: Generating
// Efficient Kernels for Quantized Inference on Large Language Models", 2023), written after its
// description: codes are unpacked to float32 in registers and multiplied by FMA on AVX2, the sums
// of 32 outputs stay in registers over a group, scales and zeros are applied once a group. A peer
// of `qigen bench-kernel`, no part of any artifact.
#include <immintrin.h>

#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kOutputs = 32;  // of a tile: four registers

struct Product {
  int32_t n, k, group;
  const uint32_t* w;    // [n / 32][k / codes of a word][32]
  const float* scales;  // [n / 32][k / group][32]
  const float* x;       // [k]
  const float* sums;    // [k / group] of x
  float* y;             // [n]
};

template <int kBits, int kCode>
inline __attribute__((always_inline)) __m256 unpacked(__m256i words) {
  constexpr int kMask = (1 << kBits) - 1;
  __m256i code = words;
  if (kCode > 0) code = _mm256_srli_epi32(code, kBits * kCode);
  if (kBits * (kCode + 1) < 32) code = _mm256_and_si256(code, _mm256_set1_epi32(kMask));
  return _mm256_cvtepi32_ps(code);
}

template <int kBits, int kCode>
inline __attribute__((always_inline)) void multiply_words(const __m256i (&words)[4], const float* x,
                                                          __m256 (&sums)[4]) {
  if constexpr (kBits * kCode < 32) {
    const __m256 value = _mm256_broadcast_ss(x + kCode);
    for (int r = 0; r < 4; ++r) {
      sums[r] = _mm256_fmadd_ps(unpacked<kBits, kCode>(words[r]), value, sums[r]);
    }
    multiply_words<kBits, kCode + 1>(words, x, sums);
  }
}

template <int kBits>
void multiply_tiles(const Product& p, int first, int last) {
  constexpr int kCodes = 32 / kBits;
  const int groups = p.k / p.group, words_of_group = p.group / kCodes;
  const __m256 zero = _mm256_set1_ps(1 << (kBits - 1));
  for (int tile = first; tile < last; ++tile) {
    const uint32_t* w = p.w + static_cast<int64_t>(tile) * (p.k / kCodes) * kOutputs;
    const float* scales = p.scales + static_cast<int64_t>(tile) * groups * kOutputs;
    const float* x = p.x;
    __m256 y[4] = {};
    for (int g = 0; g < groups; ++g) {
      __m256 sums[4] = {};
      for (int i = 0; i < words_of_group; ++i, w += kOutputs, x += kCodes) {
        __m256i words[4];
        for (int r = 0; r < 4; ++r) {
          words[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + r);
        }
        multiply_words<kBits, 0>(words, x, sums);
      }
      const __m256 shift = _mm256_mul_ps(zero, _mm256_set1_ps(p.sums[g]));
      for (int r = 0; r < 4; ++r, scales += 8) {
        y[r] = _mm256_fmadd_ps(_mm256_sub_ps(sums[r], shift), _mm256_loadu_ps(scales), y[r]);
      }
    }
    for (int r = 0; r < 4; ++r) _mm256_storeu_ps(p.y + kOutputs * tile + 8 * r, y[r]);
  }
}

}  // namespace

// One product a copy of the weight; the rows are dealt out to threads. bits: 2 or 4.
extern "C" void original_qigen(int32_t bits, const Product* products, int32_t count,
                               int32_t threads) {
  const auto multiply = bits == 4 ? multiply_tiles<4> : multiply_tiles<2>;
  const auto work = [&](int thread) {
    for (int i = 0; i < count; ++i) {
      const int tiles = products[i].n / kOutputs;
      multiply(products[i], tiles * thread / threads, tiles * (thread + 1) / threads);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
}
