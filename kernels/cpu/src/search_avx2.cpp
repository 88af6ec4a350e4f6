// AVX2 with FMA: float32 tiles of 6 x 2 vectors, as 16 registers hold them.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace negengine {
namespace {

#include "rows.inl"

constexpr int kRows = 6, kColumns = 16, kWords = 512;  // words to a sum, see FloatSums

inline void keep(Candidates& kept, int half, __m256 value, int32_t first_column) {
  float *best_at = kept.value[0] + half, *second_at = kept.value[1] + half;
  __m256i *best_column_at = reinterpret_cast<__m256i*>(kept.column[0] + half),
          *second_column_at = reinterpret_cast<__m256i*>(kept.column[1] + half);
  const __m256 best = _mm256_load_ps(best_at), second = _mm256_load_ps(second_at);
  const __m256 best_column = _mm256_castsi256_ps(_mm256_load_si256(best_column_at));
  const __m256 second_column = _mm256_castsi256_ps(_mm256_load_si256(second_column_at));
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256 column = _mm256_castsi256_ps(_mm256_add_epi32(lane, _mm256_set1_epi32(first_column + half)));
  const __m256 first = _mm256_cmp_ps(value, best, _CMP_GT_OQ), either = _mm256_cmp_ps(value, second, _CMP_GT_OQ);
  _mm256_store_ps(second_at, _mm256_max_ps(_mm256_min_ps(best, value), second));
  _mm256_store_ps(best_at, _mm256_max_ps(value, best));  // in this order a NaN, the mark of padding, leaves both
  const __m256 runner_up = _mm256_blendv_ps(_mm256_blendv_ps(second_column, column, either), best_column, first);
  _mm256_store_si256(second_column_at, _mm256_castps_si256(runner_up));
  _mm256_store_si256(best_column_at, _mm256_castps_si256(_mm256_blendv_ps(best_column, column, first)));
}

void tile(const TileCall& call) {
  alignas(kVector) float sums[kRows][kColumns];
  const float* rows[kRows];
  for (int i = 0; i < kRows; i++) rows[i] = reinterpret_cast<const float*>(call.rows[i]);
  const float* panel = reinterpret_cast<const float*>(call.panel);
  __m256 sum[kRows][2];
  for (int64_t begin = 0; begin < call.words; begin += kWords) {
    const int64_t end = begin + kWords < call.words ? begin + kWords : call.words;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (int64_t k = begin; k < end; k++) {
      const __m256 b0 = _mm256_load_ps(panel + k * kColumns), b1 = _mm256_load_ps(panel + k * kColumns + 8);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; i++) {
        const __m256 a = _mm256_broadcast_ss(rows[i] + k);
        sum[i][0] = _mm256_fmadd_ps(a, b0, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(a, b1, sum[i][1]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        if (begin > 0) sum[i][v] = _mm256_add_ps(sum[i][v], _mm256_load_ps(sums[i] + 8 * v));
        _mm256_store_ps(sums[i] + 8 * v, sum[i][v]);
      }
  }
  for (int i = 0; i < kRows; i++)
    for (int half = 0; half < kColumns; half += 8) {
      const __m256 value = _mm256_mul_ps(_mm256_load_ps(sums[i] + half), _mm256_load_ps(call.weight + half));
      keep(call.candidates[i], half, value, call.first_column);
    }
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = [] {
    Kernels k = row_kernels();
    k.tiles[int(Format::f32)] = {kRows, kColumns, tile};
    return k;
  }();
  return &kernels;
}

}  // namespace negengine
#else
namespace negengine {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace negengine
#endif
