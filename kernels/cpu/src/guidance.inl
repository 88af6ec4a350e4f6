// Guidance of stretches of elements and of tokens; included by rows.inl, so compiled once for each instruction set.
//
// Plain loops over short arrays, which the compiler turns into vectors of whatever width there is. Written with the vectors of 16
// above, of which AVX2 has none, they took 3 to 10 times as long.

constexpr int64_t kChunk = 256;  // elements at a time: a dozen arrays of them fit the L1 cache

template <class T>
inline const float* floats(const typename T::storage* p, int64_t n, float* room) {
  for (int64_t k = 0; k < n; k += 16) {
    const f32x16 v = k + 16 <= n ? T::load(p + k) : T::load(Tail<T>(p + k, n - k).values);
    __builtin_memcpy(room + k, &v, sizeof v);
  }
  return room;
}

template <>
inline const float* floats<F32>(const float* p, int64_t, float*) {
  return p;
}

template <>
inline const float* floats<BF16>(const uint16_t* p, int64_t n, float* room) {
  Word* bits = reinterpret_cast<Word*>(room);
  for (int64_t k = 0; k < n; k++) bits[k] = uint32_t(p[k]) << 16;
  return room;
}

template <class T>
inline void put(const float* v, int64_t n, typename T::storage* p) {
  for (int64_t k = 0; k < n; k += 16) {
    typename T::storage last[16];
    T::store(k + 16 <= n ? p + k : last, F32::load(v + k));
    if (k + 16 > n) __builtin_memcpy(p + k, last, static_cast<size_t>(n - k) * sizeof *p);
  }
}

template <>
inline void put<F32>(const float* v, int64_t n, float* p) {
  for (int64_t k = 0; k < n; k++) p[k] = v[k];
}

template <>
inline void put<BF16>(const float* v, int64_t n, uint16_t* p) {  // as BF16::round
  const Word* bits = reinterpret_cast<const Word*>(v);
  for (int64_t k = 0; k < n; k++) {
    const uint32_t rounded = bits[k] + 0x7fff + ((bits[k] >> 16) & 1);
    p[k] = static_cast<uint16_t>((v[k] == v[k] ? rounded : bits[k] | 0x400000) >> 16);
  }
}

#if defined(__F16C__)
template <>
inline const float* floats<F16>(const uint16_t* p, int64_t n, float* room) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) _mm256_storeu_ps(room + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k))));
  if (k < n) {
    const Tail<F16> last(p + k, n - k);
    _mm256_storeu_ps(room + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(last.values))));
  }
  return room;
}

template <>
inline void put<F16>(const float* v, int64_t n, uint16_t* p) {
  for (int64_t k = 0; k < n; k += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(v + k), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (k + 8 <= n)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k), half);
    else
      __builtin_memcpy(p + k, &half, static_cast<size_t>(n - k) * sizeof *p);
  }
}
#endif

template <class T>
void as_floats(const void* values, int64_t n, float* out) {
  const float* found = floats<T>(static_cast<const typename T::storage*>(values), n, out);
  if (found != out) __builtin_memcpy(out, found, static_cast<size_t>(n) * sizeof *out);
}

// Sums in float64, lane by lane, of values that are followed by zeros up to a multiple of 16.
struct Sums {
  typedef vector_of<float, 4>::type f32x4;
  typedef vector_of<double, 4>::type f64x4;
  f64x4 lanes[4] = {};

  void add(const float* v, int64_t n) {
    for (int64_t k = 0; k < n; k += 16)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        lanes[i] += __builtin_convertvector(*reinterpret_cast<const f32x4*>(v + k + 4 * i), f64x4);
  }
  double total() const {
    const f64x4 all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
  }
};

inline void clear(float* v, int64_t n) {
  for (int64_t k = n; k < n + 16 && k % 16 != 0; k++) v[k] = 0;
}

// e and m, see negengine_branches, of the elements that begin at `first`.
struct Pair {
  const float *base, *avoided;
};

template <class T>
inline Pair pair(const Branches& b, int64_t first, int64_t n, float (*room)[kChunk]) {
  const auto part = [=](const void* p, float* to) { return floats<T>(static_cast<const typename T::storage*>(p) + first, n, to); };
  Pair result = {part(b.conditional, room[0]), part(b.negative, room[1])};
  if (b.unconditional == nullptr) return result;
  const float *u = part(b.unconditional, room[2]), g = b.guidance;
  const auto guided = [=](const float* v, float* to) {
    for (int64_t k = 0; k < n; k++) to[k] = u[k] + g * (v[k] - u[k]);
    return to;
  };
  result.base = guided(result.base, room[3]);
  if (b.guide_negative) result.avoided = guided(result.avoided, room[4]);
  return result;
}

template <class T>
void guide(const Branches& b, void* out, int64_t n, float strength) {
  alignas(kVector) float room[6][kChunk];
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const Pair of = pair<T>(b, first, count, room);
    for (int64_t k = 0; k < count; k++) room[5][k] = of.base[k] + strength * (of.base[k] - of.avoided[k]);
    put<T>(room[5], count, static_cast<typename T::storage*>(out) + first);
  }
}

inline float clamped(float v, float clip) {  // a NaN stays one
  v = v > clip ? clip : v;
  return v < -clip ? -clip : v;
}

template <class T>
void evidence(const Branches& b, const float* sample, const float* previous, int64_t n, const Transition& t, double* sums) {
  alignas(kVector) float room[5][kChunk], terms[3][kChunk];
  const float m0 = t.means[0], m1 = t.means[1], m2 = t.means[2], m3 = t.means[3], clip = t.clip;
  Sums of[3];
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const Pair p = pair<T>(b, first, count, room);
    const float *x = sample + first, *y = previous + first;
    for (int64_t k = 0; k < count; k++) {
      const float base = clamped(m0 * x[k] + m1 * p.base[k], clip), avoided = clamped(m0 * x[k] + m1 * p.avoided[k], clip);
      const float d_base = y[k] - (m2 * base + m3 * x[k]), d_avoided = y[k] - (m2 * avoided + m3 * x[k]);
      terms[0][k] = m2 * (base - avoided) * (d_avoided + d_base);
      terms[1][k] = d_avoided * d_avoided;
      terms[2][k] = d_base * d_base;
    }
    for (int i = 0; i < 3; i++) {
      clear(terms[i], count);
      of[i].add(terms[i], count);
    }
  }
  for (int i = 0; i < 3; i++) sums[i] = of[i].total();
}

// A token, twice: for its norms, then from the cache. Either output may be the input of its name.
template <class T>
void nag(const void* positive, const void* negative, void* out, void* other, int64_t n, const NagSettings& s) {
  typedef typename T::storage S;
  const S *p = static_cast<const S*>(positive), *q = static_cast<const S*>(negative);
  alignas(kVector) float room[4][kChunk];
  const float gain = static_cast<float>(s.gain);
  Sums size, most;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const float *z = floats<T>(p + first, count, room[0]), *away = floats<T>(q + first, count, room[1]);
    for (int64_t k = 0; k < count; k++) {
      room[2][k] = __builtin_fabsf(z[k] + gain * (z[k] - away[k]));
      room[3][k] = __builtin_fabsf(z[k]);
    }
    clear(room[2], count);
    clear(room[3], count);
    size.add(room[2], count);
    most.add(room[3], count);
  }
  const double total = size.total(), ratio = total == 0 ? 1 : s.tau * most.total() / total;
  // of each stream, its share in the result: so the extrapolation is not rounded again on its way through factor and blend
  const double held = s.alpha * (ratio > 1 ? 1 : ratio);
  const float own = static_cast<float>(held + (1 - s.alpha)), apart = static_cast<float>(held * s.gain);
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = n - first < kChunk ? n - first : kChunk;
    const float *z = floats<T>(p + first, count, room[0]), *away = floats<T>(q + first, count, room[1]);
    for (int64_t k = 0; k < count; k++) room[2][k] = own * z[k] + apart * (z[k] - away[k]);
    put<T>(room[2], count, static_cast<S*>(out) + first);
    if (other != nullptr) put<T>(room[2], count, static_cast<S*>(other) + first);
  }
}
