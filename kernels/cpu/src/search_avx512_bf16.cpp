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

}  // namespace

Tile avx512_bf16_tile() { return {6, 64, tile<Product, 6, 4>}; }

}  // namespace negengine
#else
namespace negengine {
Tile avx512_bf16_tile() { return {}; }
}  // namespace negengine
#endif
