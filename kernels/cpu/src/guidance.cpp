// Guidance behind the C interface: checks, and work shared out in blocks whose sizes no thread count changes.
#define NEGENGINE_BUILD
#include <cmath>
#include <cstring>
#include <new>

#include "problem.hpp"

namespace negengine {
namespace {

constexpr int64_t kBlock = 2048;          // elements to a partial sum, and of a copy: they stay in the L1 cache
constexpr int64_t kBlocksPerTask = 8;     // of images
constexpr int64_t kBytesPerTask = 1 << 16;  // of tokens
constexpr int64_t kMost = int64_t(1) << 40;
constexpr int kMostThreads = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
bool known(int32_t dtype) { return dtype >= NEGENGINE_F32 && dtype <= NEGENGINE_F16; }
bool threads_ok(int32_t threads) { return threads >= 1 && threads <= kMostThreads; }
const char* at(const void* p, int64_t elements, int32_t dtype) { return static_cast<const char*>(p) + elements * bytes_of(dtype); }

int check(const negengine_branches* b) {
  if (b == nullptr || b->n < 0 || b->size < 0 || !known(b->dtype) || !threads_ok(b->threads)) return NEGENGINE_ERROR_ARGUMENT;
  for (int64_t stride : {b->conditional_image, b->negative_image, b->unconditional_image})
    if (stride < 0) return NEGENGINE_ERROR_ARGUMENT;
  if (b->n > kMost || b->size > kMost || (b->size > 0 && b->n > kMost / b->size)) return NEGENGINE_ERROR_SHAPE;
  if (b->n * b->size > 0 && (b->conditional == nullptr || b->negative == nullptr)) return NEGENGINE_ERROR_ARGUMENT;
  return NEGENGINE_OK;
}

Branches from(const negengine_branches& b, int64_t image, int64_t first) {
  const void* u = b.unconditional;
  return {at(b.conditional, image * b.conditional_image + first, b.dtype), at(b.negative, image * b.negative_image + first, b.dtype),
          u == nullptr ? nullptr : at(u, image * b.unconditional_image + first, b.dtype), static_cast<float>(b.guidance),
          b.guide_negative != 0};
}

// Calls body(image, block, first element, elements) for every block of every image.
template <class Body>
void each_block(negengine_workspace& workspace, const negengine_branches& b, Body&& body) {
  const int64_t blocks = ceil_div(b.size, kBlock), all = b.n * blocks;
  workspace.pool.run(ceil_div(all, kBlocksPerTask), b.threads, [&](int64_t task, int) {
    for (int64_t i = task * kBlocksPerTask; i < all && i < (task + 1) * kBlocksPerTask; i++) {
      const int64_t first = i % blocks * kBlock;
      body(i / blocks, i % blocks, first, b.size - first < kBlock ? b.size - first : kBlock);
    }
  });
}

void guide(negengine_workspace& workspace, const negengine_branches& b, const double* strength, int64_t copies, char* out) {
  const Kernels table = kernels();
  const int64_t size = bytes_of(b.dtype);
  each_block(workspace, b, [&](int64_t image, int64_t, int64_t first, int64_t count) {
    char* to = out + (image * b.size + first) * size;
    table.guide[b.dtype](from(b, image, first), to, count, static_cast<float>(strength[image]));
    for (int64_t copy = 1; copy < copies; copy++)
      std::memcpy(to + copy * b.n * b.size * size, to, static_cast<size_t>(count * size));
  });
}

void evidence(negengine_workspace& workspace, const negengine_branches& b, const negengine_transition& t, double* sums) {
  const Kernels table = kernels();
  const int64_t blocks = ceil_div(b.size, kBlock);
  double* partial = workspace.buffers[negengine_workspace::partials].get<double>(3 * b.n * blocks);
  Transition transition = {{}, static_cast<float>(t.clip)};
  for (int i = 0; i < 4; i++) transition.means[i] = static_cast<float>(t.means[i]);
  each_block(workspace, b, [&](int64_t image, int64_t block, int64_t first, int64_t count) {
    alignas(kVector) float converted[2][kBlock];
    const auto as_floats = [&](const void* p, int64_t stride, int32_t dtype, float* room) {
      const char* from = at(p, image * stride + first, dtype);
      if (dtype == NEGENGINE_F32) return reinterpret_cast<const float*>(from);
      table.as_floats[dtype](from, count, room);
      return static_cast<const float*>(room);
    };
    const float* sample = as_floats(t.sample, t.sample_image, t.sample_dtype, converted[0]);
    const float* previous = as_floats(t.previous, t.previous_image, t.previous_dtype, converted[1]);
    table.evidence[b.dtype](from(b, image, first), sample, previous, count, transition, partial + 3 * (image * blocks + block));
  });
  for (int64_t image = 0; image < b.n; image++)
    for (int which = 0; which < 3; which++) {
      double total = 0;
      for (int64_t block = 0; block < blocks; block++) total += partial[3 * (image * blocks + block) + which];
      sums[which * b.n + image] = total;
    }
}

int check(const negengine_nag_arguments* a) {
  if (a == nullptr || a->B < 0 || a->T < 0 || a->D < 0 || !known(a->dtype) || !threads_ok(a->threads)) return NEGENGINE_ERROR_ARGUMENT;
  for (int64_t stride : {a->positive_image, a->positive_token, a->negative_image, a->negative_token, a->out_image, a->out_token,
                         a->other_image, a->other_token})
    if (stride < 0) return NEGENGINE_ERROR_ARGUMENT;
  if (!(std::isfinite(a->scale) && std::isfinite(a->alpha) && std::isfinite(a->tau) && a->tau >= 0)) return NEGENGINE_ERROR_ARGUMENT;
  if (a->B > kMost || a->T > kMost || a->D > kMost || (a->T > 0 && a->B > kMost / a->T) ||
      (a->D > 0 && a->B * a->T > kMost / a->D))
    return NEGENGINE_ERROR_SHAPE;
  if (a->B * a->T * a->D == 0) return NEGENGINE_OK;
  if (a->positive == nullptr || a->negative == nullptr || a->out == nullptr) return NEGENGINE_ERROR_ARGUMENT;
  const auto in_place = [&](const void* in, const void* out, int64_t image, int64_t token, int64_t to_image, int64_t to_token) {
    return in != out || ((a->B == 1 || image == to_image) && (a->T == 1 || token == to_token));
  };
  return in_place(a->positive, a->out, a->positive_image, a->positive_token, a->out_image, a->out_token) &&
                 in_place(a->negative, a->other, a->negative_image, a->negative_token, a->other_image, a->other_token)
             ? NEGENGINE_OK
             : NEGENGINE_ERROR_ARGUMENT;
}

void nag(negengine_workspace& workspace, const negengine_nag_arguments& a) {
  const Kernels table = kernels();
  const NagSettings settings = {a.scale - 1, a.tau, a.alpha};
  const int64_t rows = a.B * a.T, some = ceil_div(kBytesPerTask, a.D * bytes_of(a.dtype));
  workspace.pool.run(ceil_div(rows, some), a.threads, [&](int64_t task, int) {
    for (int64_t row = task * some; row < rows && row < (task + 1) * some; row++) {
      const int64_t b = row / a.T, t = row % a.T;
      char* out = const_cast<char*>(at(a.out, b * a.out_image + t * a.out_token, a.dtype));
      char* other = a.other == nullptr ? nullptr : const_cast<char*>(at(a.other, b * a.other_image + t * a.other_token, a.dtype));
      table.nag[a.dtype](at(a.positive, b * a.positive_image + t * a.positive_token, a.dtype),
                         at(a.negative, b * a.negative_image + t * a.negative_token, a.dtype), out, other, a.D, settings);
    }
  });
}

// Runs `body` with the workspace to itself.
template <class Body>
int with(negengine_workspace& workspace, Body&& body) {
  const std::lock_guard<std::mutex> lock(workspace.mutex);
  int result = NEGENGINE_ERROR_MEMORY;
  try {
    body();
    result = NEGENGINE_OK;
  } catch (const std::bad_alloc&) {
  }
  const size_t used = workspace.bytes();
  workspace.peak = used > workspace.peak ? used : workspace.peak;
  if (used > workspace.limit) workspace.release();
  return result;
}

}  // namespace
}  // namespace negengine

using namespace negengine;

extern "C" {

int negengine_guide(negengine_workspace* workspace, const negengine_branches* b, const double* strength, int64_t copies, void* out) {
  const int status = workspace == nullptr ? int(NEGENGINE_ERROR_ARGUMENT) : check(b);
  if (status != NEGENGINE_OK) return status;
  if (copies < 1) return NEGENGINE_ERROR_ARGUMENT;
  if (b->n * b->size == 0) return NEGENGINE_OK;
  if (copies > kMost / (b->n * b->size)) return NEGENGINE_ERROR_SHAPE;
  if (strength == nullptr || out == nullptr) return NEGENGINE_ERROR_ARGUMENT;
  return with(*workspace, [&] { guide(*workspace, *b, strength, copies, static_cast<char*>(out)); });
}

int negengine_evidence(negengine_workspace* workspace, const negengine_branches* b, const negengine_transition* t, double* sums) {
  const int status = workspace == nullptr ? int(NEGENGINE_ERROR_ARGUMENT) : check(b);
  if (status != NEGENGINE_OK) return status;
  if (t == nullptr || !known(t->sample_dtype) || !known(t->previous_dtype) || t->sample_image < 0 || t->previous_image < 0)
    return NEGENGINE_ERROR_ARGUMENT;
  if (!(t->clip > 0)) return NEGENGINE_ERROR_ARGUMENT;
  if (b->n * b->size > 0 && (t->sample == nullptr || t->previous == nullptr)) return NEGENGINE_ERROR_ARGUMENT;
  if (b->n > 0 && sums == nullptr) return NEGENGINE_ERROR_ARGUMENT;
  return with(*workspace, [&] { evidence(*workspace, *b, *t, sums); });
}

int negengine_nag(negengine_workspace* workspace, const negengine_nag_arguments* arguments) {
  const int status = workspace == nullptr ? int(NEGENGINE_ERROR_ARGUMENT) : check(arguments);
  if (status != NEGENGINE_OK || arguments->B * arguments->T * arguments->D == 0) return status;
  return with(*workspace, [&] { nag(*workspace, *arguments); });
}

}  // extern "C"
