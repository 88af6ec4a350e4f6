// AVX-512 BF16: two channels to a word; products are exact in float32.
#include "kernels.hpp"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace negengine {
namespace {

#include "search_avx512.inl"

struct Product : FloatSums {
  static constexpr int64_t kWords = 256;
  static inline Sum add(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

inline __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

}  // namespace

double avx512_bf16_dot(const void* a, const void* b, int64_t n) {
  constexpr int64_t kLong = 8192;  // as dot_f32 in rows.inl
  const uint16_t *p = static_cast<const uint16_t*>(a), *q = static_cast<const uint16_t*>(b);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kLong) {
    const int64_t end = begin + kLong < n ? begin + kLong : n;
    __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = begin;
    for (; k + 128 <= end; k += 128)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) part[i] = _mm512_dpbf16_ps(part[i], load(p + k + 32 * i), load(q + k + 32 * i));
    for (; k < end; k += 32) {
      const __mmask32 mask = end - k < 32 ? (__mmask32(1) << (end - k)) - 1 : ~__mmask32(0);
      part[0] = _mm512_dpbf16_ps(part[0], (__m512bh)_mm512_maskz_loadu_epi16(mask, p + k), (__m512bh)_mm512_maskz_loadu_epi16(mask, q + k));
    }
    total += static_cast<double>(_mm512_reduce_add_ps((part[0] + part[1]) + (part[2] + part[3])));
  }
  return total;
}

Tile avx512_bf16_tile() { return {6, 64, tile<Product, 6, 4>}; }

}  // namespace negengine
#else
namespace negengine {
Tile avx512_bf16_tile() { return {}; }
double avx512_bf16_dot(const void*, const void*, int64_t) { return 0; }
}  // namespace negengine
#endif
