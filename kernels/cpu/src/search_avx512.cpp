// AVX-512: float32 tiles.
#include "kernels.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace negengine {
namespace {

#include "rows.inl"
#include "search_avx512.inl"

struct Product : FloatSums {
  static constexpr int64_t kWords = 512;
  static inline Sum add(Sum sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k = row_kernels();
    k.tiles[int(Format::f32)] = {12, 32, tile<Product, 12, 2>};
    return k;
  }();
  return &kernels;
}

}  // namespace negengine
#else
namespace negengine {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace negengine
#endif
