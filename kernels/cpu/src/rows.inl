// Work on single rows, compiled once for each instruction set through the compiler's vector types. Include inside an
// anonymous namespace.

template <class T, int N>
struct vector_of {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};
typedef vector_of<float, 16>::type f32x16;
typedef vector_of<double, 16>::type f64x16;
typedef vector_of<uint32_t, 16>::type u32x16;
typedef vector_of<int32_t, 16>::type i32x16;
typedef vector_of<uint16_t, 16>::type u16x16;
typedef vector_of<int8_t, 16>::type i8x16;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions that the compiler would split in halves are spelled out for 512-bit vectors.
#if defined(__AVX512F__)
inline u32x16 widen(const uint16_t* p) {
  return (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline u16x16 narrow(u32x16 v) { return (u16x16)_mm512_cvtepi32_epi16((__m512i)v); }
inline i8x16 to_bytes(i32x16 v) { return (i8x16)_mm512_cvtepi32_epi8((__m512i)v); }
#else
inline u32x16 widen(const uint16_t* p) { return __builtin_convertvector(*reinterpret_cast<const u16x16*>(p), u32x16); }
inline u16x16 narrow(u32x16 v) { return __builtin_convertvector(v, u16x16); }
inline i8x16 to_bytes(i32x16 v) { return __builtin_convertvector(v, i8x16); }
#endif

struct F32 {
  typedef float storage;
  static inline f32x16 load(const float* p) { return *reinterpret_cast<const f32x16*>(p); }
  static inline void store(float* p, f32x16 v) { *reinterpret_cast<f32x16*>(p) = v; }
};

struct BF16 {
  typedef uint16_t storage;
  static inline f32x16 load(const uint16_t* p) {
    return bit_cast<f32x16>(widen(p) << 16);
  }
  static inline u16x16 round(f32x16 v) {  // to nearest, ties to even; a NaN stays one
    const u32x16 bits = bit_cast<u32x16>(v);
    const u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return narrow((v == v ? rounded : bits | 0x400000) >> 16);
  }
  static inline void store(uint16_t* p, f32x16 v) { *reinterpret_cast<u16x16*>(p) = round(v); }
};

struct F16 {
  typedef uint16_t storage;
  static inline f32x16 load(const uint16_t* p) {
    const u32x16 half = widen(p);
    const u32x16 magnitude = (half & 0x7fff) << 13;
    const f32x16 finite = bit_cast<f32x16>(magnitude) * 0x1p112f;  // moves the bias; right for subnormals too
    const u32x16 bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : bit_cast<u32x16>(finite);
    return bit_cast<f32x16>(bits | (half & 0x8000) << 16);
  }
  static inline void store(uint16_t* p, f32x16 v) {
    const u32x16 sign = bit_cast<u32x16>(v) & 0x80000000u;
    const u32x16 bits = bit_cast<u32x16>(v) ^ sign;
    // adding 0.5 leaves a subnormal's digits, rounded, in the low bits
    const u32x16 subnormal = bit_cast<u32x16>(bit_cast<f32x16>(bits) + 0.5f) - 0x3f000000;
    const u32x16 normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    u32x16 half = bits < (113u << 23) ? subnormal : normal;
    half = bits >= 0x477ff000 ? u32x16{} + 0x7c00 : half;  // rounds to infinity
    half = bits > 0x7f800000 ? u32x16{} + 0x7e00 : half;
    *reinterpret_cast<u16x16*>(p) = narrow(half | sign >> 16);
  }
};

// The last, incomplete vector of a row, filled up with zeros.
template <class T>
struct Tail {
  typename T::storage values[16];
  Tail(const typename T::storage* p, int64_t n) {
    __builtin_memset(values, 0, sizeof values);
    __builtin_memcpy(values, p, static_cast<size_t>(n) * sizeof *values);
  }
};

// Calls f(k, 16 values) along a row; the last values are followed by zeros.
template <class T, class F>
inline void for_each_vector(const void* row, int64_t n, F&& f) {
  const typename T::storage* p = static_cast<const typename T::storage*>(row);
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) f(k, T::load(p + k));
  if (k < n) f(k, T::load(Tail<T>(p + k, n - k).values));
}

// Like it, and stores what f returns in `out`, up to n_padded.
template <class T, class Out, class F>
inline void convert(const void* row, int64_t n, int64_t n_padded, Out* out, F&& f) {
  const typename T::storage* p = static_cast<const typename T::storage*>(row);
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) {
    const auto result = f(T::load(p + k));
    __builtin_memcpy(out + k, &result, sizeof result);
  }
  if (k < n_padded) {
    const auto result = f(T::load(Tail<T>(p + k, n - k).values));
    __builtin_memcpy(out + k, &result, sizeof(Out) * static_cast<size_t>(n_padded - k));
  }
}

inline double sum(f64x16 v) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

template <class T>
double dot(const void* a, const void* b, int64_t n) {
  const typename T::storage *p = static_cast<const typename T::storage*>(a), *q = static_cast<const typename T::storage*>(b);
  f64x16 total = {}, other = {};
  int64_t k = 0;
  for (; k + 32 <= n; k += 32) {
    total += __builtin_convertvector(T::load(p + k), f64x16) * __builtin_convertvector(T::load(q + k), f64x16);
    other += __builtin_convertvector(T::load(p + k + 16), f64x16) * __builtin_convertvector(T::load(q + k + 16), f64x16);
  }
  for (; k < n; k += 16) {
    const int64_t left = n - k < 16 ? n - k : 16;
    total += __builtin_convertvector(T::load(Tail<T>(p + k, left).values), f64x16) *
             __builtin_convertvector(T::load(Tail<T>(q + k, left).values), f64x16);
  }
  return sum(total + other);
}

inline float sum(f32x16 v) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

// Many short sums: their rounding is far below that of one long sum.
template <class T>
double dot_f32(const void* a, const void* b, int64_t n) {
  constexpr int64_t kLong = 8192;
  const typename T::storage *p = static_cast<const typename T::storage*>(a), *q = static_cast<const typename T::storage*>(b);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kLong) {
    const int64_t end = begin + kLong < n ? begin + kLong : n;
    f32x16 part0 = {}, part1 = {}, part2 = {}, part3 = {};
    int64_t k = begin;
    for (; k + 64 <= end; k += 64) {
      part0 += T::load(p + k) * T::load(q + k);
      part1 += T::load(p + k + 16) * T::load(q + k + 16);
      part2 += T::load(p + k + 32) * T::load(q + k + 32);
      part3 += T::load(p + k + 48) * T::load(q + k + 48);
    }
    for (; k < end; k += 16) {
      const int64_t left = end - k < 16 ? end - k : 16;
      part0 += T::load(Tail<T>(p + k, left).values) * T::load(Tail<T>(q + k, left).values);
    }
    total += static_cast<double>(sum((part0 + part1) + (part2 + part3)));
  }
  return total;
}

inline f32x16 scaled(f32x16 v, double scale) {  // in float64: the scale of a subnormal row is no float32
  return scale == 1 ? v : __builtin_convertvector(__builtin_convertvector(v, f64x16) * scale, f32x16);
}

template <class T>
void to_f32(const void* row, int64_t n, int64_t n_padded, double scale, float* out) {
  convert<T>(row, n, n_padded, out, [=](f32x16 v) { return scaled(v, scale); });
}

template <class T>
double to_bf16(const void* row, int64_t n, int64_t n_padded, double scale, uint16_t* out) {
  f32x16 error2 = {};
  convert<T>(row, n, n_padded, out, [=, &error2](f32x16 v) {
    v = scaled(v, scale);
    const u16x16 rounded = BF16::round(v);
    const f32x16 error = v - BF16::load(reinterpret_cast<const uint16_t*>(&rounded));
    error2 += error * error;
    return rounded;
  });
  return static_cast<double>(sum(error2));
}

template <class T>
uint64_t hash(const void* row, int64_t n) {
  u32x16 lanes = {};
  for_each_vector<T>(row, n, [&](int64_t, f32x16 v) {
    lanes = (lanes ^ bit_cast<u32x16>(v + 0.0f)) * 0x9e3779b1u + 0x85ebca6bu;  // adding zero takes the sign off one
    lanes ^= lanes >> 15;
  });
  uint64_t result = 0;
  for (int i = 0; i < 16; i++) {
    result = (result ^ lanes[i]) * 0x9e3779b97f4a7c15u;
    result ^= result >> 32;
  }
  return result;
}

template <class T>
inline float largest(const void* row, int64_t n, double scale, Centre centre) {
  f32x16 peaks = {};
  for_each_vector<T>(row, n, [&](int64_t k, f32x16 v) {
    v = scaled(v, scale) - centre.size * F32::load(centre.direction + k);
    v = v < 0 ? -v : v;
    peaks = v > peaks ? v : peaks;
  });
  float peak = 0;
  for (int i = 0; i < 16; i++) peak = peaks[i] > peak ? peaks[i] : peak;
  return peak;
}

template <class T>
Quantised to_int8(const void* row, int64_t n, int64_t n_padded, double scale, Centre centre, int zero, uint8_t* out) {
  const float peak = largest<T>(row, n, scale, centre);
  const bool some = peak > 0x1p-100f;  // centring may leave next to nothing, of which the inverse is no float32
  const float step = some ? peak / 127 : 0, inverse = some ? 127 / peak : 0;
  i32x16 total = {}, vanished = {};
  f32x16 norm2 = {}, projection = {}, error2 = {}, lost2 = {};
  const float* direction = centre.direction;
  convert<T>(row, n, n_padded, out, [=, &direction, &total, &vanished, &norm2, &projection, &error2, &lost2](f32x16 v) {
    const f32x16 along = F32::load(direction);
    direction += 16;
    v = scaled(v, scale) - centre.size * along;
    const f32x16 shifted = v * inverse + 0x1.8p23f;  // rounds to the nearest integer, ties to even
    const i32x16 integer = bit_cast<i32x16>(shifted) - 0x4b400000;
    const f32x16 error = v - __builtin_convertvector(integer, f32x16) * step;
    norm2 += v * v;
    projection += v * along;
    error2 += error * error;
    total += integer;
    const i32x16 gone = (integer == 0) & (v != 0);
    vanished -= gone;
    lost2 += bit_cast<f32x16>(bit_cast<i32x16>(error * error) & gone);
    return to_bytes(integer + zero);
  });
  int64_t count = 0;
  Quantised result = {step, 0, static_cast<double>(sum(norm2)), static_cast<double>(sum(projection)), static_cast<double>(sum(error2)), 0};
  for (int i = 0; i < 16; i++) result.sum += total[i], count += vanished[i];
  result.lost = __builtin_sqrt(static_cast<double>(sum(lost2)) * static_cast<double>(count) / static_cast<double>(n));
  return result;
}

template <class T>
void extrapolate(const void* x, const void* r, void* y, int64_t n, float one_plus, float minus) {
  const typename T::storage *p = static_cast<const typename T::storage*>(x), *q = static_cast<const typename T::storage*>(r);
  typename T::storage* out = static_cast<typename T::storage*>(y);
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) T::store(out + k, one_plus * T::load(p + k) - minus * T::load(q + k));
  if (k < n) {
    Tail<T> last(p + k, n - k);
    T::store(last.values, one_plus * T::load(last.values) - minus * T::load(Tail<T>(q + k, n - k).values));
    __builtin_memcpy(out + k, last.values, static_cast<size_t>(n - k) * sizeof *out);
  }
}

#include "guidance.inl"

// All of the table but the tiles.
inline Kernels row_kernels() {
  Kernels kernels = {};
  const auto set = [&](auto type, int i) {
    typedef decltype(type) T;
    kernels.dot[i] = dot<T>;
    kernels.dot_f32[i] = dot_f32<T>;
    kernels.hash[i] = hash<T>;
    kernels.to_f32[i] = to_f32<T>;
    kernels.to_bf16[i] = to_bf16<T>;
    kernels.to_int8[i] = to_int8<T>;
    kernels.extrapolate[i] = extrapolate<T>;
    kernels.as_floats[i] = as_floats<T>;
    kernels.guide[i] = guide<T>;
    kernels.evidence[i] = evidence<T>;
    kernels.nag[i] = nag<T>;
  };
  set(F32(), 0);
  set(BF16(), 1);
  set(F16(), 2);
  return kernels;
}
