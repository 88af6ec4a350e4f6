// The update y = (1 + alpha) x - alpha r, in place also where rows that others read are overwritten.
#include <atomic>
#include <cstring>
#include <vector>

#include "problem.hpp"

namespace negengine {
namespace {

constexpr int64_t kRowsPerTask = 32;

class Merge {
 public:
  Merge(Call& call, const int32_t* index, const uint8_t* gate, const double* alpha, int64_t alpha_image, char* y, int64_t y_image,
        int64_t y_token);
  void run();

 private:
  const char* source(int64_t row) const { return call_.source(row / T_).token(row % T_); }
  char* target(int64_t row) const { return y_ + row / T_ * y_image_ + row % T_ * y_token_; }
  void update(int64_t row, const char* reference) const;
  const char* reference(int64_t row) const;

  bool overlaps() const;
  bool locate();
  int64_t overwritten(int64_t row) const;
  void take_snapshot();
  void in_order();
  void each(int64_t tasks, const std::function<void(int64_t, int)>& task) {
    call_.workspace.pool.run(tasks, call_.problem.threads, task);
  }

  Call& call_;
  const negengine_problem& problem_;
  const int32_t* index_;
  const uint8_t* gate_;
  const double* alpha_;
  const int64_t alpha_image_, size_, T_, rows_, row_bytes_;
  char* y_;
  const int64_t y_image_, y_token_;                       // bytes
  int64_t image_shift_ = 0, token_shift_ = 0;             // bank token (r, j) lies where y's (r, j) + these shifts does
  const char* snapshot_ = nullptr;                        // [R, M, D], of the images that are read
};

Merge::Merge(Call& call, const int32_t* index, const uint8_t* gate, const double* alpha, int64_t alpha_image, char* y,
             int64_t y_image, int64_t y_token)
    : call_(call),
      problem_(call.problem),
      index_(index),
      gate_(gate),
      alpha_(alpha),
      alpha_image_(alpha_image),
      size_(bytes_of(problem_.dtype)),
      T_(problem_.T),
      rows_(problem_.B * problem_.T),
      row_bytes_(problem_.D * size_),
      y_(y),
      y_image_(y_image * size_),
      y_token_(y_token * size_) {}

const char* Merge::reference(int64_t row) const {
  const int64_t slot = index_[row] / problem_.M, token = index_[row] % problem_.M;
  const int64_t image = call_.image(row / T_, slot);
  if (snapshot_ != nullptr) return snapshot_ + (image * problem_.M + token) * row_bytes_;
  return call_.reference(image).token(token);
}

void Merge::update(int64_t row, const char* reference) const {
  const double alpha = alpha_[row / T_ * alpha_image_];
  // 1 + alpha in float64, as Python would: then float32 gives the bits of the published expression
  call_.kernels.extrapolate[problem_.dtype](source(row), reference, target(row), problem_.D, static_cast<float>(1 + alpha),
                                            static_cast<float>(alpha));
}

// Whether the memory of the bank and that of y meet.
bool Merge::overlaps() const {
  const auto end = [this](int64_t images, int64_t image_stride, int64_t tokens, int64_t token_stride) {
    return (images - 1) * image_stride + (tokens - 1) * token_stride + row_bytes_;
  };
  const char* bank = static_cast<const char*>(problem_.bank);
  const char* bank_end = bank + end(problem_.R, problem_.bank_image * size_, problem_.M, problem_.bank_token * size_);
  const char* y_end = y_ + end(problem_.B, y_image_, T_, y_token_);
  return bank < y_end && y_ < bank_end;
}

// Whether tokens of the bank lie exactly where tokens of y do, if they meet at all.
bool Merge::locate() {
  if (problem_.bank_image * size_ != y_image_ || problem_.bank_token * size_ != y_token_) return false;
  const int64_t shift = static_cast<const char*>(problem_.bank) - y_;
  if (shift < 0 || y_image_ == 0 || y_token_ == 0) return false;
  const int64_t outer = y_image_ > y_token_ ? y_image_ : y_token_, inner = y_image_ + y_token_ - outer;
  if (shift % outer % inner != 0) return false;
  image_shift_ = y_image_ == outer ? shift / outer : shift % outer / inner;
  token_shift_ = y_image_ == outer ? shift % outer / inner : shift / outer;
  // what the shift carries beyond the inner extent may lie in the next image or token
  return y_image_ == outer ? token_shift_ + problem_.M <= T_ : image_shift_ + problem_.R <= problem_.B;
}

// The row of y that the reference of `row` is part of and that changes, or -1.
int64_t Merge::overwritten(int64_t row) const {
  const int64_t image = call_.image(row / T_, index_[row] / problem_.M) + image_shift_;
  const int64_t token = index_[row] % problem_.M + token_shift_;
  if (image >= problem_.B || token >= T_) return -1;
  const int64_t other = image * T_ + token;
  return other != row && gate_[other] ? other : -1;
}

void Merge::take_snapshot() {
  std::vector<char> read(static_cast<size_t>(problem_.R), 0);
  for (int64_t row = 0; row < rows_; row++)
    if (gate_[row]) read[static_cast<size_t>(call_.image(row / T_, index_[row] / problem_.M))] = 1;
  char* copy = call_.workspace.buffers[negengine_workspace::snapshot].get<char>(problem_.R * problem_.M * row_bytes_);
  each(problem_.R * problem_.M, [&](int64_t i, int) {
    if (!read[static_cast<size_t>(i / problem_.M)]) return;
    const char* token = call_.reference(i / problem_.M).token(i % problem_.M);
    std::memcpy(copy + i * row_bytes_, token, static_cast<size_t>(row_bytes_));
  });
  snapshot_ = copy;
}

// Every row reads one other, so the rows form trees and cycles. A row may be written once nobody waits to read it: first the
// leaves and whatever they set free, then each cycle from a copy of the row that it begins with.
void Merge::in_order() {
  auto& buffers = call_.workspace.buffers;
  auto* readers = buffers[negengine_workspace::readers].get<std::atomic<int32_t>>(rows_);
  std::vector<int64_t> leaves, cycles;
  for (int64_t row = 0; row < rows_; row++) readers[row].store(0, std::memory_order_relaxed);
  for (int64_t row = 0; row < rows_; row++)
    if (gate_[row]) {
      const int64_t other = overwritten(row);
      if (other >= 0) readers[other].fetch_add(1, std::memory_order_relaxed);
    }
  for (int64_t row = 0; row < rows_; row++)
    if (gate_[row] && readers[row].load(std::memory_order_relaxed) == 0) leaves.push_back(row);
  constexpr int32_t kWritten = -1;
  each(static_cast<int64_t>(leaves.size() + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (size_t i = static_cast<size_t>(task * kRowsPerTask); i < leaves.size() && i < static_cast<size_t>((task + 1) * kRowsPerTask); i++)
      for (int64_t row = leaves[i]; row >= 0;) {
        const int64_t other = overwritten(row);
        update(row, reference(row));
        readers[row].store(kWritten, std::memory_order_relaxed);
        row = other >= 0 && readers[other].fetch_sub(1, std::memory_order_acq_rel) == 1 ? other : -1;
      }
  });
  for (int64_t row = 0; row < rows_; row++) {
    if (!gate_[row] || readers[row].load(std::memory_order_relaxed) <= 0) continue;
    cycles.push_back(row);
    for (int64_t next = row; readers[next].load(std::memory_order_relaxed) > 0; next = overwritten(next))
      readers[next].store(kWritten, std::memory_order_relaxed);
  }
  char* first = buffers[negengine_workspace::snapshot].get<char>(problem_.threads * row_bytes_);
  each(static_cast<int64_t>(cycles.size()), [&](int64_t i, int thread) {
    const int64_t begin = cycles[static_cast<size_t>(i)];
    char* copy = first + thread * row_bytes_;
    std::memcpy(copy, target(begin), static_cast<size_t>(row_bytes_));
    for (int64_t row = begin; row >= 0;) {
      const int64_t next = overwritten(row);
      update(row, next == begin ? copy : reference(row));
      row = next == begin ? -1 : next;
    }
  });
}

void Merge::run() {
  const bool in_place = y_ == problem_.x;
  if (overlaps()) {
    if (in_place && locate()) return in_order();
    take_snapshot();
  }
  each((rows_ + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t row = task * kRowsPerTask; row < rows_ && row < (task + 1) * kRowsPerTask; row++) {
      if (gate_[row])
        update(row, reference(row));
      else if (!in_place)
        std::memcpy(target(row), source(row), static_cast<size_t>(row_bytes_));
    }
  });
}

}  // namespace

void merge(Call& call, const int32_t* index, const uint8_t* gate, const double* alpha, int64_t alpha_image, char* y,
           int64_t y_image, int64_t y_token) {
  if (call.problem.B * call.problem.T > 0) Merge(call, index, gate, alpha, alpha_image, y, y_image, y_token).run();
}

}  // namespace negengine
