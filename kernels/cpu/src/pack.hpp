// The columns of a search: the tokens of one image that may be chosen, packed into panels.
#pragma once

#include <functional>

#include "problem.hpp"

namespace negengine {

// A power of two that brings a row's norm near 1, where products neither overflow nor vanish; 1 for ordinary rows.
double comfortable(double norm);

// Euclidean norm of a token; not finite if the token is not.
double norm_of(const Call& call, const char* token);

// Where the words of a search come from: a row as it is, or its conversion.
class Words {
 public:
  Words(const Call& call, Format format);

  int64_t per_row() const { return words_; }
  bool direct() const { return direct_; }  // rows of this dtype need no conversion, if they are comfortable and aligned

  struct Row {
    const Word* words;
    Quantised quantised;  // unless int8: step 1, not centred
  };
  bool readable(const char* token, double norm) const;
  // `norm` of the token; `direction` as centre_of gives it. The first where readable() holds.
  Row as_it_is(const char* token, double norm) const;
  Row converted(const char* token, double norm, const float* direction, int zero, Word* scratch) const;

 private:
  const Kernels& kernels_;
  Format format_;
  int dtype_;
  int64_t channels_, words_;
  bool direct_;
};

// A row of which int8 loses more than this is searched exactly: beside a huge channel nothing is left of the others. What a
// cosine loses is at most the norm of the channels that vanished times what the other row has in them, which is taken to
// be their share of all channels.
constexpr double kMostLost = 0.01;

struct Columns {
  const Word* panels;
  const float* weights;
  const int32_t* offsets;
  const float* constants;
  const int32_t* tokens;  // of each column, ascending
  const double* norms;    // of each token of the image
  int64_t count;          // without the padding of the last panel
  double error;           // largest relative error that rounding left in a column
  double size;            // largest norm of a centred column, relative to its norm
};

// Tokens of `image` for which allowed(i) holds, that are finite and equal to none before them: equal rows tie, and the first
// of them must win. Fills `norms` of the image (NaN where a token is not finite or not allowed). Returns their number.
int64_t choose_columns(Call& call, const Image& image, const std::function<bool(int64_t)>& allowed, int32_t* tokens,
                       double* norms);

// The mean of unit rows of the columns [channels, padded], for an int8 search to centre on: all tokens of an image often share
// most of themselves, and eight bits then tell few of them apart. For rows u, v of norm 1 and the mean m, with u' = u - m and
// v' = v - m: <u, v> = <u', v'> + <m, v'> + what is the same for all v. A sample of the columns will do.
const float* centre_of(Call& call, const Image& image, const int32_t* tokens, const double* norms, int64_t count);

// Packs `count` columns from `begin` on. Marks in `hard` [tokens], unless it is null, those that lose too much; they are packed
// so as not to be chosen.
Columns pack_columns(Call& call, const Words& words, const Tile& tile, const Image& image, const int32_t* tokens,
                     const double* norms, const float* direction, int64_t begin, int64_t count, uint8_t* hard);

}  // namespace negengine
