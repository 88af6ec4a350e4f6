// A register tile of ROWS x VECTORS accumulators and its epilogue. Include inside an anonymous namespace.
// Constant, unrolled loops over arrays become registers; nothing here may be indexed by a variable.

// Product: multiplies a broadcast word of the row with a vector of the panel, and adds.
template <class Product, int ROWS, int VECTORS>
void tile(const TileCall& call) {
  constexpr int columns = VECTORS * kLanes;
  alignas(kVector) float sums[ROWS * columns];
  const Word* rows[ROWS];
  for (int i = 0; i < ROWS; i++) rows[i] = call.rows[i];
  typename Product::Sum sum[ROWS][VECTORS];
  int64_t begin = 0;
  do {
    const int64_t end = begin + Product::kWords < call.words ? begin + Product::kWords : call.words;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[i][v] = Product::zero();
    const Word* panel = call.panel + begin * columns;
    for (int64_t k = begin; k < end; k++, panel += columns) {
      __m512i b[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) b[v] = _mm512_load_si512(panel + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const __m512i a = _mm512_set1_epi32(static_cast<int>(rows[i][k]));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[i][v] = Product::add(sum[i][v], a, b[v]);
      }
    }
    if (begin > 0) Product::template carry<ROWS, VECTORS>(sum, sums);
    if (end < call.words) Product::template save<ROWS, VECTORS>(sum, sums);
    begin = end;
  } while (begin < call.words);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    Candidates& kept = call.candidates[i];
    __m512 best = _mm512_load_ps(kept.value[0]), second = _mm512_load_ps(kept.value[1]);
    __m512i best_column = _mm512_load_si512(kept.column[0]), second_column = _mm512_load_si512(kept.column[1]);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const __m512 value = Product::value(sum[i][v], call, i, v);
      const __m512i column = _mm512_add_epi32(lane, _mm512_set1_epi32(call.first_column + v * kLanes));
      const __mmask16 first = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);  // strictly: of equals the lower column stays
      const __mmask16 either = _mm512_cmp_ps_mask(value, second, _CMP_GT_OQ);
      second = _mm512_max_ps(_mm512_min_ps(best, value), second);  // in this order a NaN, the mark of padding, leaves both
      second_column = _mm512_mask_mov_epi32(second_column, either, column);
      second_column = _mm512_mask_mov_epi32(second_column, first, best_column);
      best = _mm512_max_ps(value, best);
      best_column = _mm512_mask_mov_epi32(best_column, first, column);
    }
    _mm512_store_ps(kept.value[0], best);
    _mm512_store_ps(kept.value[1], second);
    _mm512_store_si512(kept.column[0], best_column);
    _mm512_store_si512(kept.column[1], second_column);
  }
}

// Sums in float32 start anew every kWords words: rounding grows with the length of a sum.
struct FloatSums {
  typedef __m512 Sum;
  static inline Sum zero() { return _mm512_setzero_ps(); }
  static inline __m512 value(Sum sum, const TileCall& call, int, int v) {
    return _mm512_mul_ps(sum, _mm512_load_ps(call.weight + v * kLanes));
  }
  template <int ROWS, int VECTORS>
  static inline void carry(Sum (&sum)[ROWS][VECTORS], const float* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_load_ps(sums + (i * VECTORS + v) * kLanes));
  }
  template <int ROWS, int VECTORS>
  static inline void save(const Sum (&sum)[ROWS][VECTORS], float* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) _mm512_store_ps(sums + (i * VECTORS + v) * kLanes, sum[i][v]);
  }
};
