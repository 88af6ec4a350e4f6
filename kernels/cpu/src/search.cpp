// The search: superblocks of source rows, handed out to threads, against every panel of an image.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pack.hpp"

namespace negengine {
namespace {

constexpr int64_t kBlock = 384;                      // rows that stream past a panel while it stays in the L2 cache
constexpr int64_t kSmallBlock = 96;
constexpr int64_t kPanelBytes = 25300000;            // of one image that are packed at once; 4096 x 3072 in bfloat16 fit
constexpr int64_t kScaledRows = 16;                  // rows of a block that may need conversion where most do not
constexpr int64_t kAlias = 4096;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Rows that search one image: the tokens of another, and where their results go.
struct Rows {
  Image image;
  int64_t mask_image;  // image of the mask that says which rows take part, or -1
  int64_t result;      // of the first row
  int32_t first_index; // of the first column
};

struct Block {
  const Rows* rows;
  int64_t begin, end;
};

struct Row {
  int64_t token;
  double norm;    // at least eps
  double factor;  // cosine = factor * value of a candidate
  double error;   // relative, of its conversion
  double size;    // norm of the centred row, relative to its norm
};

// Scratch memory of one thread.
struct Scratch {
  Word* words;
  const Word** pointers;
  Candidates* candidates;
  Row* rows;
  float* shifts;
};

class Search {
 public:
  // hard [B * T], or null: an int8 search marks the rows there that it leaves to an exact one, which takes no other rows.
  Search(Call& call, Format format, float* cosine, int32_t* index, uint8_t* hard);

  // Rows against those tokens of `image` for which allowed(i) holds. An int8 search marks in `hard_columns` [tokens] those that
  // it leaves out.
  void run(const Image& image, const std::function<bool(int64_t)>& allowed, const std::vector<Rows>& all_rows,
           uint8_t* hard_columns = nullptr);

 private:
  void block(const Image& image, const Columns& columns, const Block& block, const Scratch& scratch);
  void rescore(const Image& image, const Columns& columns, const Rows& rows, const Row& row, const Candidates& candidates);

  Call& call_;
  const Format format_;
  const Tile tile_;
  const Words words_;
  float* cosine_;
  int32_t* index_;
  uint8_t* hard_;
  double rounding_;       // of a sum of products, as a cosine
  const float* direction_ = nullptr;
  int64_t capacity_ = 0;  // converted rows of a block
  int64_t pitch_;         // words from one of them to the next
  bool direct_;           // rows of the source are read where they lie
};

Search::Search(Call& call, Format format, float* cosine, int32_t* index, uint8_t* hard)
    : call_(call),
      format_(format),
      tile_(call.kernels.tiles[int(format)]),
      words_(call, format),
      cosine_(cosine),
      index_(index),
      hard_(hard) {
  // Rows a multiple of 4096 bytes apart share one set of the L1 cache, which holds fewer lines than a tile has rows.
  const negengine_problem& problem = call.problem;
  const int64_t distance = problem.matching == NEGENGINE_PAPER ? problem.x_token : problem.bank_token;
  direct_ = words_.direct() && distance * bytes_of(problem.dtype) % kAlias != 0;
  constexpr int64_t kWordBytes = sizeof(Word);
  pitch_ = words_.per_row() + (words_.per_row() * kWordBytes % kAlias == 0 ? kVector / kWordBytes : 0);
  const double chunks = static_cast<double>(call.problem.D) / 4096;
  rounding_ = (format == Format::int8 ? 1e-5 : 2e-6) * (chunks > 1 ? std::sqrt(chunks) : 1);
}

void Search::run(const Image& image, const std::function<bool(int64_t)>& allowed, const std::vector<Rows>& all_rows,
                 uint8_t* hard_columns) {
  auto& buffers = call_.workspace.buffers;
  const int threads = call_.problem.threads;
  int32_t* tokens = buffers[negengine_workspace::columns].get<int32_t>(image.tokens);
  double* norms = buffers[negengine_workspace::norms].get<double>(image.tokens);
  const int64_t count = choose_columns(call_, image, allowed, tokens, norms);

  if (format_ == Format::int8) direction_ = centre_of(call_, image, tokens, norms, count);

  int64_t total = 0;
  for (const Rows& rows : all_rows) total += rows.image.tokens;
  int64_t size = total / (16 * threads);
  size = size < kSmallBlock ? kSmallBlock : size > kBlock ? kBlock : (size + tile_.rows - 1) / tile_.rows * tile_.rows;
  std::vector<Block> blocks;
  for (const Rows& rows : all_rows)
    for (int64_t begin = 0; begin < rows.image.tokens; begin += size)
      blocks.push_back({&rows, begin, begin + size < rows.image.tokens ? begin + size : rows.image.tokens});

  const int64_t slots = size + tile_.rows, per_row = words_.per_row();
  const int64_t row_bytes = per_row * static_cast<int64_t>(sizeof(Word));
  const int64_t panels = (count + tile_.columns - 1) / tile_.columns;
  const int64_t at_once = std::max<int64_t>(1, kPanelBytes / (row_bytes * tile_.columns)), waves = (panels + at_once - 1) / at_once;
  const int64_t wave = waves == 0 ? 0 : (panels + waves - 1) / waves * tile_.columns;
  capacity_ = direct_ && size > kScaledRows ? kScaledRows : size;
  for (int64_t begin = 0; begin < count; begin += wave) {
    const int64_t width = begin + wave < count ? wave : count - begin;
    const Columns columns = pack_columns(call_, words_, tile_, image, tokens, norms, direction_, begin, width, hard_columns);
    Word* words = buffers[negengine_workspace::scratch].get<Word>(threads * capacity_ * pitch_);
    const Word** pointers = buffers[negengine_workspace::pointers].get<const Word*>(threads * slots);
    Candidates* candidates = buffers[negengine_workspace::candidates].get<Candidates>(threads * slots);
    Row* rows = buffers[negengine_workspace::rows].get<Row>(threads * slots);
    float* shifts = buffers[negengine_workspace::shifts].get<float>(threads * slots);
    call_.workspace.pool.run(static_cast<int64_t>(blocks.size()), threads, [&](int64_t b, int thread) {
      block(image, columns, blocks[static_cast<size_t>(b)],
            {words + thread * capacity_ * pitch_, pointers + thread * slots, candidates + thread * slots, rows + thread * slots,
             shifts + thread * slots});
    });
  }
}

void Search::block(const Image& image, const Columns& columns, const Block& block, const Scratch& scratch) {
  const Rows& rows = *block.rows;
  const int zero = format_ == Format::int8 ? 128 : 0;
  for (int64_t token = block.begin; token < block.end;) {
    int64_t count = 0, converted = 0;
    for (; token < block.end && converted < capacity_; token++) {
      if (rows.mask_image >= 0 && !call_.allowed(rows.mask_image, token)) continue;
      uint8_t* hard = hard_ == nullptr ? nullptr : hard_ + rows.result + token;
      if (hard != nullptr && format_ != Format::int8 && !*hard) continue;
      const char* data = rows.image.token(token);
      const double norm = norm_of(call_, data);
      if (!std::isfinite(norm)) continue;
      const double scale = comfortable(norm), at_least = norm > kEps ? norm : kEps;
      const bool here = direct_ && words_.readable(data, norm);
      const Words::Row read = here ? words_.as_it_is(data, norm)
                                   : words_.converted(data, norm, direction_, zero, scratch.words + converted++ * pitch_);
      const Quantised& quantised = read.quantised;
      if (format_ == Format::int8 && quantised.lost > kMostLost * scale * norm) {
        *hard = 1;
        continue;
      }
      const double step = quantised.step > 0 ? quantised.step : 1;  // of nothing but zeros
      const double relative = norm > 0 ? 1 / (scale * norm) : 0;
      scratch.pointers[count] = read.words;
      scratch.shifts[count] = static_cast<float>(scale * norm / step);
      scratch.rows[count++] = {token, at_least, step / (scale * at_least), std::sqrt(quantised.error2) * relative,
                               std::sqrt(quantised.norm2) * relative};
    }
    if (count == 0) continue;
    const int64_t padded = (count + tile_.rows - 1) / tile_.rows * tile_.rows;
    for (int64_t i = count; i < padded; i++) {
      scratch.pointers[i] = scratch.pointers[count - 1];
      scratch.shifts[i] = 0;
    }
    for (int64_t i = 0; i < padded; i++)
      for (int kept = 0; kept < kKept; kept++)
        for (int lane = 0; lane < kLanes; lane++) {
          scratch.candidates[i].value[kept][lane] = kNone;
          scratch.candidates[i].column[kept][lane] = -1;
        }
    const int64_t stride = tile_.columns * words_.per_row();
    for (int64_t first = 0, panel = 0; first < columns.count; first += tile_.columns, panel++)
      for (int64_t i = 0; i < padded; i += tile_.rows)
        tile_.run({scratch.pointers + i, columns.panels + panel * stride, words_.per_row(), columns.weights + first,
                   columns.offsets + first, columns.constants + first, scratch.shifts + i, static_cast<int32_t>(first),
                   scratch.candidates + i});
    for (int64_t i = 0; i < count; i++) rescore(image, columns, rows, scratch.rows[i], scratch.candidates[i]);
  }
}

void Search::rescore(const Image& image, const Columns& columns, const Rows& rows, const Row& row, const Candidates& candidates) {
  float best_value = kNone;
  for (float value : candidates.value[0]) best_value = value > best_value ? value : best_value;
  // by the inequality of Cauchy and Schwarz the best column's value is within this of the best value
  const double margin = 2 * (rounding_ + row.error * columns.size + row.size * columns.error + row.error * columns.error);
  const double enough = best_value - margin / row.factor;
  const char* token = rows.image.token(row.token);
  const int dtype = call_.problem.dtype;
  const bool ordinary = comfortable(row.norm) == 1;
  float best = cosine_[rows.result + row.token];
  int32_t best_index = index_[rows.result + row.token];
  for (int kept = 0; kept < kKept; kept++)
    for (int lane = 0; lane < kLanes; lane++) {
      const int32_t column = candidates.column[kept][lane];
      if (column < 0 || candidates.value[kept][lane] < enough) continue;
      const int32_t j = columns.tokens[column], index = rows.first_index + j;
      const double norm = columns.norms[j] > kEps ? columns.norms[j] : kEps;
      const auto dot = ordinary && comfortable(norm) == 1 ? call_.kernels.dot_f32[dtype] : call_.kernels.dot[dtype];
      const float cosine = static_cast<float>(dot(token, image.token(j), call_.problem.D) / (row.norm * norm));
      if (cosine > best || (cosine == best && index < best_index)) {
        best = cosine;
        best_index = index;
      }
    }
  cosine_[rows.result + row.token] = best;
  index_[rows.result + row.token] = best_index;
}

// Products of bfloat16 are exact in float32.
Format exact_format(const negengine_problem& problem, const Kernels& kernels) {
  return problem.dtype == NEGENGINE_BF16 && kernels.tiles[int(Format::bf16)].run != nullptr ? Format::bf16 : Format::f32;
}

// A search as the problem asks for: an int8 search is followed by exact ones for what it left out.
class Searches {
 public:
  Searches(Call& call, float* cosine, int32_t* index);
  void run(const Image& image, const std::function<bool(int64_t)>& allowed, const std::vector<Rows>& rows);

 private:
  const bool int8_;
  const Format exact_;
  const int64_t rows_;
  uint8_t *hard_ = nullptr, *hard_columns_ = nullptr;
  Call& call_;
  float* cosine_;
  int32_t* index_;
};

Searches::Searches(Call& call, float* cosine, int32_t* index)
    : int8_(format_of(call.problem, call.kernels) == Format::int8),
      exact_(exact_format(call.problem, call.kernels)),
      rows_(call.problem.B * call.problem.T),
      call_(call),
      cosine_(cosine),
      index_(index) {
  if (int8_) hard_ = call.workspace.buffers[negengine_workspace::hard].get<uint8_t>(rows_ + std::max(call.problem.M, call.problem.T));
  hard_columns_ = hard_ + rows_;
}

void Searches::run(const Image& image, const std::function<bool(int64_t)>& allowed, const std::vector<Rows>& rows) {
  if (!int8_) return Search(call_, format_of(call_.problem, call_.kernels), cosine_, index_, nullptr).run(image, allowed, rows);
  std::fill(hard_, hard_columns_ + image.tokens, uint8_t(0));
  Search(call_, Format::int8, cosine_, index_, hard_).run(image, allowed, rows, hard_columns_);
  if (std::any_of(hard_columns_, hard_columns_ + image.tokens, [](uint8_t hard) { return hard != 0; })) {
    const auto left_out = [&](int64_t i) { return hard_columns_[i] && allowed(i); };
    Search(call_, exact_, cosine_, index_, nullptr).run(image, left_out, rows);
  }
  if (std::any_of(hard_, hard_ + rows_, [](uint8_t hard) { return hard != 0; }))
    Search(call_, exact_, cosine_, index_, hard_).run(image, allowed, rows);
}

// The images that search in image r, each once: the first slot wins a tie.
std::vector<Rows> sources_of(const Call& call, int64_t r) {
  const negengine_problem& problem = call.problem;
  std::vector<Rows> rows;
  for (int64_t b = 0; b < problem.B; b++)
    for (int64_t slot = 0; slot < problem.K; slot++)
      if (call.image(b, slot) == r) {
        rows.push_back({call.source(b), -1, b * problem.T, static_cast<int32_t>(slot * problem.M)});
        break;
      }
  return rows;
}

}  // namespace

Format format_of(const negengine_problem& problem, const Kernels& kernels) {
  // bfloat16 is promised 1e-2, which int8 keeps at twice the speed
  const bool coarse = problem.dtype == NEGENGINE_BF16 && problem.D <= kMostInt8Channels && kernels.tiles[int(Format::int8)].run != nullptr;
  if (problem.search == NEGENGINE_SEARCH_INT8 || (problem.search == NEGENGINE_AUTO && coarse)) return Format::int8;
  if (problem.search == NEGENGINE_SEARCH_BF16) return Format::bf16;
  return exact_format(problem, kernels);
}

void match(Call& call, float* cosine, int32_t* index) {
  const negengine_problem& problem = call.problem;
  for (int64_t i = 0; i < problem.B * problem.T; i++) {
    cosine[i] = kNone;
    index[i] = -1;
  }
  if (problem.T == 0) return;
  Searches search(call, cosine, index);
  if (problem.matching == NEGENGINE_PAPER) {
    for (int64_t r = 0; r < problem.R; r++) {
      const std::vector<Rows> rows = sources_of(call, r);
      if (!rows.empty()) search.run(call.reference(r), [&](int64_t i) { return call.allowed(r, i); }, rows);
    }
  } else {  // the same search with the roles exchanged; the index found is then used as that of a reference token
    for (int64_t b = 0; b < problem.B; b++) {
      const int64_t r = call.image(b, 0);
      if (r < 0) continue;
      const Image reference = call.reference(r);
      const auto finite = [&](int64_t i) { return std::isfinite(norm_of(call, reference.token(i))); };
      search.run(call.source(b), finite, {{reference, problem.mask == nullptr ? -1 : r, b * problem.T, 0}});
    }
  }
}

}  // namespace negengine
