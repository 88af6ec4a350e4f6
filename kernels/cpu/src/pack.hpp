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
    Quantised quantised;  // step 1 unless int8
  };
  bool readable(const char* token, double scale) const;
  Row read(const char* token, double scale, int zero, Word* scratch) const;

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
  const int32_t* tokens;  // of each column, ascending
  const double* norms;    // of each token of the image
  int64_t count;          // without the padding of the last panel
  double error;           // largest relative error that rounding left in a column
};

// Tokens of `image` for which allowed(i) holds, that are finite and equal to none before them: equal rows tie, and the first
// of them must win. Fills `norms` of the image (NaN where a token is not finite or not allowed). Returns their number.
int64_t choose_columns(Call& call, const Image& image, const std::function<bool(int64_t)>& allowed, int32_t* tokens,
                       double* norms);

// Packs `count` columns from `begin` on. Marks in `hard` [tokens], unless it is null, those that lose too much; they are packed
// so as not to be chosen.
Columns pack_columns(Call& call, const Words& words, const Tile& tile, const Image& image, const int32_t* tokens,
                     const double* norms, int64_t begin, int64_t count, uint8_t* hard);

}  // namespace negengine
