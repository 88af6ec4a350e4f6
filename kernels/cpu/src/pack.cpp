#include "pack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace negengine {
namespace {

constexpr int64_t kTokensPerTask = 64;

float value_of(const char* token, int64_t k, int dtype) {
  if (dtype == NEGENGINE_F32) {
    float value;
    std::memcpy(&value, token + 4 * k, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, token + 2 * k, 2);
  // enough to compare: equal bits, and zeros of both signs
  return (bits & 0x7fff) == 0 ? 0.0f : static_cast<float>(bits);
}

bool equal(const char* a, const char* b, int64_t channels, int dtype) {
  if (std::memcmp(a, b, static_cast<size_t>(channels * bytes_of(dtype))) == 0) return true;
  for (int64_t k = 0; k < channels; k++)
    if (value_of(a, k, dtype) != value_of(b, k, dtype)) return false;
  return true;
}

// rows[c][k] -> panel[k][c] for kLanes columns, which are one cache line, of a panel with `columns`
void interleave(const Word* const* rows, int64_t words, int columns, Word* panel) {
  for (int64_t begin = 0; begin < words; begin += kLanes) {
    const int64_t end = begin + kLanes < words ? begin + kLanes : words;
    for (int c = 0; c < kLanes; c++)
      for (int64_t k = begin; k < end; k++) panel[k * columns + c] = rows[c][k];
  }
}

}  // namespace

double comfortable(double norm) {
  constexpr double kSmall = 0x1p-30, kLarge = 0x1p30;
  if ((norm >= kSmall && norm <= kLarge) || norm == 0) return 1;
  return std::ldexp(1.0, -std::ilogb(norm));
}

double norm_of(const Call& call, const char* token) {
  const int dtype = call.problem.dtype;
  const double square = call.kernels.dot_f32[dtype](token, token, call.problem.D);
  if (square >= 0x1p-60 && square <= 0x1p60) return std::sqrt(square);
  return std::sqrt(call.kernels.dot[dtype](token, token, call.problem.D));  // float32 may have overflowed or vanished
}

Words::Words(const Call& call, Format format)
    : kernels_(call.kernels), format_(format), dtype_(call.problem.dtype), channels_(call.problem.D) {
  const int64_t per_word = channels_per_word(format);
  words_ = (channels_ + per_word - 1) / per_word;
  direct_ = channels_ % per_word == 0 && ((format == Format::f32 && dtype_ == NEGENGINE_F32) ||
                                           (format == Format::bf16 && dtype_ == NEGENGINE_BF16));
}

bool Words::readable(const char* token, double norm) const {
  return direct_ && comfortable(norm) == 1 && reinterpret_cast<uintptr_t>(token) % sizeof(Word) == 0;
}

Words::Row Words::as_it_is(const char* token, double norm) const {
  return {reinterpret_cast<const Word*>(token), {1, 0, norm * norm, 0, 0, 0}};
}

Words::Row Words::converted(const char* token, double norm, const float* direction, int zero, Word* scratch) const {
  const double scale = comfortable(norm);
  Quantised quantised = {1, 0, scale * norm * scale * norm, 0, 0, 0};
  const int64_t padded = words_ * channels_per_word(format_);
  if (format_ == Format::f32)
    kernels_.to_f32[dtype_](token, channels_, padded, scale, reinterpret_cast<float*>(scratch));
  else if (format_ == Format::bf16)
    quantised.error2 = kernels_.to_bf16[dtype_](token, channels_, padded, scale, reinterpret_cast<uint16_t*>(scratch));
  else
    quantised = kernels_.to_int8[dtype_](token, channels_, padded, scale, {direction, static_cast<float>(scale * norm)}, zero,
                                         reinterpret_cast<uint8_t*>(scratch));
  return {scratch, quantised};
}

int64_t choose_columns(Call& call, const Image& image, const std::function<bool(int64_t)>& allowed, int32_t* tokens,
                       double* norms) {
  const int dtype = call.problem.dtype;
  const int64_t D = call.problem.D;
  uint64_t* keys = call.workspace.buffers[negengine_workspace::hashes].get<uint64_t>(image.tokens);
  call.workspace.pool.run((image.tokens + kTokensPerTask - 1) / kTokensPerTask, call.problem.threads, [&](int64_t task, int) {
    for (int64_t i = task * kTokensPerTask; i < image.tokens && i < (task + 1) * kTokensPerTask; i++) {
      const char* token = image.token(i);
      const double norm = allowed(i) ? norm_of(call, token) : NAN;
      norms[i] = std::isfinite(norm) ? norm : NAN;
      keys[i] = std::isfinite(norm) ? call.kernels.hash[dtype](token, D) : 0;
    }
  });
  size_t slots = 2;
  while (slots < 2 * static_cast<size_t>(image.tokens)) slots *= 2;
  std::vector<int32_t> table(slots, -1);
  int64_t count = 0;
  for (int64_t i = 0; i < image.tokens; i++) {
    if (std::isnan(norms[i])) continue;
    size_t slot = keys[i] & (slots - 1);
    for (; table[slot] >= 0; slot = (slot + 1) & (slots - 1))
      if (keys[table[slot]] == keys[i] && equal(image.token(table[slot]), image.token(i), D, dtype)) break;
    if (table[slot] >= 0) continue;
    table[slot] = static_cast<int32_t>(i);
    tokens[count++] = static_cast<int32_t>(i);
  }
  return count;
}

const float* centre_of(Call& call, const Image& image, const int32_t* tokens, const double* norms, int64_t count) {
  constexpr int64_t kSample = 128;
  const int64_t D = call.problem.D, padded = (D + kLanes - 1) / kLanes * kLanes, step = (count + kSample - 1) / kSample;
  float* mean = call.workspace.buffers[negengine_workspace::centre].get<float>(2 * padded);
  float* row = mean + padded;
  std::fill(mean, row, 0.0f);
  int64_t taken = 0;
  for (int64_t i = 0; i < count; i += step) {
    const double norm = norms[tokens[i]], scale = comfortable(norm);
    if (norm == 0) continue;
    call.kernels.to_f32[call.problem.dtype](image.token(tokens[i]), D, padded, scale, row);
    const float inverse = static_cast<float>(1 / (scale * norm));
    for (int64_t k = 0; k < padded; k++) mean[k] += inverse * row[k];
    taken++;
  }
  for (int64_t k = 0; k < padded && taken > 0; k++) mean[k] /= static_cast<float>(taken);
  return mean;
}

Columns pack_columns(Call& call, const Words& words, const Tile& tile, const Image& image, const int32_t* tokens,
                     const double* norms, const float* direction, int64_t begin, int64_t count, uint8_t* hard) {
  const int64_t panels = (count + tile.columns - 1) / tile.columns, padded = panels * tile.columns, per_row = words.per_row();
  auto& buffers = call.workspace.buffers;
  Word* packed = buffers[negengine_workspace::panels].get<Word>(padded * per_row);
  float* weights = buffers[negengine_workspace::weights].get<float>(padded);
  int32_t* offsets = buffers[negengine_workspace::offsets].get<int32_t>(padded);
  float* constants = buffers[negengine_workspace::constants].get<float>(padded);
  const int threads = call.problem.threads;
  Word* scratch = buffers[negengine_workspace::scratch].get<Word>(threads * kLanes * per_row);
  struct Worst {
    double error, size;
  };
  std::vector<Worst> of_panels(static_cast<size_t>(panels));
  call.workspace.pool.run(panels, threads, [&](int64_t p, int thread) {
    const Word* rows[kLanes];
    Worst worst = {0, 0};
    for (int c = 0; c < tile.columns; c++) {
      const int64_t column = p * tile.columns + c;
      // the last panel repeats the last column, with a weight that no comparison chooses
      const int32_t token = tokens[begin + (column < count ? column : count - 1)];
      const double norm = norms[token], scale = comfortable(norm);
      const char* data = image.token(token);
      Word* own = scratch + (thread * kLanes + c % kLanes) * per_row;
      const bool here = words.readable(data, norm);
      const Words::Row row = here ? words.as_it_is(data, norm) : words.converted(data, norm, direction, 0, own);
      rows[c % kLanes] = row.words;
      const double weight = 1 / (scale * (norm > kEps ? norm : kEps));
      offsets[column] = static_cast<int32_t>(128u * static_cast<uint32_t>(row.quantised.sum));
      // below eps the cosine is less than that of the direction, and the identity of centre_of does not hold
      const bool lost = hard != nullptr && (norm <= kEps || row.quantised.lost > kMostLost * scale * norm);
      if (lost) {
        hard[token] = 1;
      } else if (norm > 0) {
        worst.error = std::max(worst.error, std::sqrt(row.quantised.error2) / (scale * norm));
        worst.size = std::max(worst.size, std::sqrt(row.quantised.norm2) / (scale * norm));
      }
      constants[column] = static_cast<float>(lost ? 0 : row.quantised.projection * weight);
      weights[column] = column < count && !lost ? static_cast<float>(row.quantised.step * weight) : std::numeric_limits<float>::quiet_NaN();
      if ((c + 1) % kLanes == 0)
        interleave(rows, per_row, tile.columns, packed + p * tile.columns * per_row + c + 1 - kLanes);
    }
    of_panels[static_cast<size_t>(p)] = worst;
  });
  Worst worst = {0, 0};
  for (const Worst& panel : of_panels) worst = {std::max(worst.error, panel.error), std::max(worst.size, panel.size)};
  return {packed, weights, offsets, constants, tokens + begin, norms, count, worst.error, worst.size};
}

}  // namespace negengine
