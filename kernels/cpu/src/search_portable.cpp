// Plain C++ with the compiler's vector types, for every other processor.
#include "kernels.hpp"

namespace negengine {
namespace {

#include "rows.inl"

constexpr int kRows = 3, kColumns = 16, kWords = 512;  // words to a sum: rounding grows with its length

void tile(const TileCall& call) {
  typedef vector_of<float, 4>::type f32x4;
  alignas(kVector) float sums[kRows][kColumns] = {};
  const float* rows[kRows];
  for (int i = 0; i < kRows; i++) rows[i] = reinterpret_cast<const float*>(call.rows[i]);
  const float* panel = reinterpret_cast<const float*>(call.panel);
  for (int64_t begin = 0; begin < call.words; begin += kWords) {
    const int64_t end = begin + kWords < call.words ? begin + kWords : call.words;
    f32x4 sum[kRows][4] = {};
    for (int64_t k = begin; k < end; k++) {
      const f32x4* b = reinterpret_cast<const f32x4*>(panel + k * kColumns);
#pragma GCC unroll 3
      for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sum[i][v] += rows[i][k] * b[v];
    }
#pragma GCC unroll 3
    for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) *reinterpret_cast<f32x4*>(sums[i] + 4 * v) += sum[i][v];
  }
  for (int i = 0; i < kRows; i++) {
    Candidates& kept = call.candidates[i];
    for (int lane = 0; lane < kLanes; lane++) {
      const float value = sums[i][lane] * call.weight[lane];
      const int32_t column = call.first_column + lane;
      if (value > kept.value[0][lane]) {  // strictly: of equals the lower column stays
        kept.value[1][lane] = kept.value[0][lane];
        kept.column[1][lane] = kept.column[0][lane];
        kept.value[0][lane] = value;
        kept.column[0][lane] = column;
      } else if (value > kept.value[1][lane]) {
        kept.value[1][lane] = value;
        kept.column[1][lane] = column;
      }
    }
  }
}

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = [] {
    Kernels k = row_kernels();
    k.tiles[int(Format::f32)] = {kRows, kColumns, tile};
    return k;
  }();
  return &kernels;
}

}  // namespace negengine
