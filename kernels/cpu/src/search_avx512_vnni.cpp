// AVX-512 VNNI: four channels to a word. The instruction wants one operand unsigned: source rows come with 128 added, which
// 128 times the sum of the column takes away again, modulo 2^32.
#include "kernels.hpp"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

namespace negengine {
namespace {

#include "search_avx512.inl"

struct Product {
  typedef __m512i Sum;
  static constexpr int64_t kWords = int64_t(1) << 40;  // integers do not round: one sum
  static inline Sum zero() { return _mm512_setzero_si512(); }
  static inline Sum add(Sum sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static inline __m512 value(Sum sum, const TileCall& call, int i, int v) {
    const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_load_si512(call.offset + v * kLanes)));
    const __m512 centred = _mm512_mul_ps(product, _mm512_load_ps(call.weight + v * kLanes));
    return _mm512_fmadd_ps(_mm512_set1_ps(call.shift[i]), _mm512_load_ps(call.constant + v * kLanes), centred);
  }
  template <int ROWS, int VECTORS>
  static inline void carry(Sum (&)[ROWS][VECTORS], const float*) {}
  template <int ROWS, int VECTORS>
  static inline void save(const Sum (&)[ROWS][VECTORS], float*) {}
};

}  // namespace

Tile avx512_vnni_tile() { return {6, 64, tile<Product, 6, 4>}; }

}  // namespace negengine
#else
namespace negengine {
Tile avx512_vnni_tile() { return {}; }
}  // namespace negengine
#endif
