// A checked problem, and the steps that a call is made of.
#pragma once

#include "dispatch.hpp"
#include "negengine_cpu.h"
#include "workspace.hpp"

namespace negengine {

constexpr double kEps = 1e-12;
constexpr int64_t kMostInt8Channels = 131072;  // of which the integer sums fit 32 bits

inline int64_t bytes_of(int dtype) { return dtype == NEGENGINE_F32 ? 4 : 2; }

// The tokens of one image.
struct Image {
  const char* data;
  int64_t tokens;
  int64_t stride;  // bytes

  const char* token(int64_t i) const { return data + i * stride; }
};

struct Call {
  negengine_workspace& workspace;
  const negengine_problem& problem;
  const Kernels kernels;

  Image source(int64_t b) const {
    const int64_t size = bytes_of(problem.dtype);
    return {static_cast<const char*>(problem.x) + b * problem.x_image * size, problem.T, problem.x_token * size};
  }
  Image reference(int64_t r) const {
    const int64_t size = bytes_of(problem.dtype);
    return {static_cast<const char*>(problem.bank) + r * problem.bank_image * size, problem.M, problem.bank_token * size};
  }
  int32_t image(int64_t b, int64_t slot) const {
    return problem.references[b * problem.references_image + slot * problem.references_slot];
  }
  bool allowed(int64_t r, int64_t token) const {
    return problem.mask == nullptr || problem.mask[r * problem.mask_image + token * problem.mask_token] != 0;
  }
};

// Format of the search for this dtype and instruction set.
Format format_of(const negengine_problem& problem, const Kernels& kernels);

// cosine, index [B, T]: the best reference token of every source token.
void match(Call& call, float* cosine, int32_t* index);

// gate [B, T] into y.
void merge(Call& call, const int32_t* index, const uint8_t* gate, const double* alpha, int64_t alpha_image, char* y,
           int64_t y_image, int64_t y_token);

}  // namespace negengine
