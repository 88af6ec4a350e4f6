// What one instruction set offers to the rest, as a table of functions.
//
// Files compiled for one instruction set include this header and no standard C++ header: an inline function that two files
// share would be linked once, with the instructions of either.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace negengine {

constexpr int kLanes = 16;     // column j of a panel competes in lane j % 16
constexpr int kKept = 2;       // candidates a lane keeps: with one, quantised searches miss winners
constexpr int kDTypes = 3;     // in the order of negengine_dtype
constexpr int kVector = 64;    // bytes; alignment of panels

typedef uint32_t __attribute__((may_alias)) Word;

enum class Format { f32, bf16, int8 };  // of the search: 1, 2 or 4 channels to a 32-bit word
constexpr int channels_per_word(Format format) { return format == Format::f32 ? 1 : format == Format::bf16 ? 2 : 4; }

// The best columns of one row, lane by lane, best first.
struct alignas(kVector) Candidates {
  float value[kKept][kLanes];
  int32_t column[kKept][kLanes];
};

// `rows` source rows against the `columns` columns of one panel, over the whole depth.
struct TileCall {
  const Word* const* rows;   // words of each row
  const Word* panel;        // [words][columns]
  int64_t words;
  const float* weight;    // [columns]: makes a product a cosine, but for the row's own factor; NaN: never to be chosen
  const int32_t* offset;  // [columns]: subtracted from an int8 product
  const float* constant;  // [columns] and
  const float* shift;     // [rows]: their product is added to an int8 value, for what centring took away
  int32_t first_column;
  Candidates* candidates;  // one for each row
};

struct Tile {
  int rows, columns;
  void (*run)(const TileCall&);
};

// A row subtracted from every other before it is rounded: what all tokens share needs no bits.
struct Centre {
  const float* direction;  // padded with zeros to a multiple of 16
  float size;              // how much of it is subtracted from the row times its scale
};

// All of the row times its scale, after centring.
struct Quantised {
  float step;        // value = step * integer
  int32_t sum;       // of the integers
  double norm2;      // squared norm
  double projection; // product with the direction of the centre
  double error2;     // squared norm of what rounding took
  double lost;       // norm of the channels that became zero, times the root of their share among all
};

// Predictions from one element on; no unconditional one without classifier-free guidance.
struct Branches {
  const void *conditional, *negative, *unconditional;
  float guidance;
  bool guide_negative;
};

// From predictions to the means of the step before; clip may be infinite.
struct Transition {
  float means[4], clip;
};

struct NagSettings {
  double gain, tau, alpha;  // gain: scale - 1
};

struct Kernels {
  Tile tiles[3];  // by Format; run is null where there is none
  // <a, b> in float64: products are exact, and so is the order
  double (*dot[kDTypes])(const void* a, const void* b, int64_t n);
  // the same from sums in float32, for rows whose products neither overflow nor vanish
  double (*dot_f32[kDTypes])(const void* a, const void* b, int64_t n);
  // the same for equal rows, zeros of either sign being equal
  uint64_t (*hash[kDTypes])(const void* row, int64_t n);
  // scale * row as float32 or bfloat16 (returns the squared norm of what rounding took), padded with zeros to n_padded
  void (*to_f32[kDTypes])(const void* row, int64_t n, int64_t n_padded, double scale, float* out);
  double (*to_bf16[kDTypes])(const void* row, int64_t n, int64_t n_padded, double scale, uint16_t* out);
  // scale * row - centre as integers -127 ... 127 plus `zero`
  Quantised (*to_int8[kDTypes])(const void* row, int64_t n, int64_t n_padded, double scale, Centre centre, int zero, uint8_t* out);
  // y = one_plus * x - minus * r in float32, rounded once
  void (*extrapolate[kDTypes])(const void* x, const void* r, void* y, int64_t n, float one_plus, float minus);
  // the values as float32, followed by anything up to a multiple of 16
  void (*as_floats[kDTypes])(const void* values, int64_t n, float* out);
  // e + strength * (e - m) in float32, rounded once
  void (*guide[kDTypes])(const Branches&, void* out, int64_t n, float strength);
  // three sums: of the differences of squares, of the squares for m, of those for e; sample and previous have n elements, no more
  void (*evidence[kDTypes])(const Branches&, const float* sample, const float* previous, int64_t n, const Transition&, double* sums);
  // one token of n channels; other may be null
  void (*nag[kDTypes])(const void* positive, const void* negative, void* out, void* other, int64_t n, const NagSettings&);
};

// Null where the build lacks the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
Tile avx512_vnni_tile();
Tile avx512_bf16_tile();
double avx512_bf16_dot(const void* a, const void* b, int64_t n);  // for dot_f32

}  // namespace negengine
