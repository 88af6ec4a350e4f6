// The C interface: checks, the gate, and nothing that throws across it.
#define NEGENGINE_BUILD
#include "negengine_cpu.h"

#include <new>

#include "problem.hpp"

namespace negengine {
namespace {

constexpr int64_t kMostTokens = int64_t(1) << 31, kMostChannels = int64_t(1) << 24;
constexpr int kMostThreads = 1024;

int check(const negengine_problem* p) {
  if (p == nullptr) return NEGENGINE_ERROR_ARGUMENT;
  if (p->B < 0 || p->T < 0 || p->R < 1 || p->M < 1 || p->D < 1 || p->K < 1) return NEGENGINE_ERROR_ARGUMENT;
  if (p->bank == nullptr || (p->B > 0 && (p->references == nullptr || (p->x == nullptr && p->T > 0))))
    return NEGENGINE_ERROR_ARGUMENT;
  for (int64_t stride : {p->x_image, p->x_token, p->bank_image, p->bank_token, p->references_image, p->references_slot,
                         p->mask_image, p->mask_token})
    if (stride < 0) return NEGENGINE_ERROR_ARGUMENT;
  if (p->dtype < NEGENGINE_F32 || p->dtype > NEGENGINE_F16 || p->matching < NEGENGINE_PAPER || p->matching > NEGENGINE_RELEASE ||
      p->search < NEGENGINE_AUTO || p->search > NEGENGINE_SEARCH_INT8 || p->threads < 1 || p->threads > kMostThreads)
    return NEGENGINE_ERROR_ARGUMENT;
  if (p->D > kMostChannels || p->M >= kMostTokens || p->K >= kMostTokens || p->K * p->M >= kMostTokens ||
      p->T >= kMostTokens || p->B >= kMostTokens || (p->T > 0 && p->B > (int64_t(1) << 40) / p->T))
    return NEGENGINE_ERROR_SHAPE;
  if (p->search == NEGENGINE_SEARCH_INT8 && p->D > kMostInt8Channels) return NEGENGINE_ERROR_SHAPE;  // sums would wrap
  if (p->matching == NEGENGINE_RELEASE && (p->K != 1 || p->M != p->T)) return NEGENGINE_ERROR_SHAPE;
  for (int64_t b = 0; b < p->B; b++)
    for (int64_t slot = 0; slot < p->K; slot++)
      if (p->references[b * p->references_image + slot * p->references_slot] >= p->R) return NEGENGINE_ERROR_REFERENCE;
  return NEGENGINE_OK;
}

// Whether y may be written: elsewhere than x, or where x is, token by token.
bool writable(const negengine_problem& p, const void* y, int64_t y_image, int64_t y_token) {
  if (y_image < 0 || y_token < 0) return false;
  if (p.B * p.T == 0) return true;
  return y != nullptr && (y != p.x || ((p.B == 1 || y_image == p.x_image) && (p.T == 1 || y_token == p.x_token)));
}

// Runs `body(call)` with the workspace to itself.
template <class Body>
int with(negengine_workspace* workspace, const negengine_problem* problem, Body&& body) {
  if (workspace == nullptr) return NEGENGINE_ERROR_ARGUMENT;
  const int status = check(problem);
  if (status != NEGENGINE_OK) return status;
  const std::lock_guard<std::mutex> lock(workspace->mutex);
  Call call = {*workspace, *problem, kernels()};
  if (call.kernels.tiles[int(format_of(*problem, call.kernels))].run == nullptr) return NEGENGINE_ERROR_UNSUPPORTED;
  int result = NEGENGINE_ERROR_MEMORY;
  try {
    result = body(call);
  } catch (const std::bad_alloc&) {
  }
  const size_t used = workspace->bytes();
  workspace->peak = used > workspace->peak ? used : workspace->peak;
  if (used > workspace->limit) workspace->release();
  return result;
}

}  // namespace
}  // namespace negengine

using namespace negengine;

extern "C" {

int negengine_abi(void) { return NEGENGINE_ABI; }

const char* negengine_status_text(int status) {
  switch (status) {
    case NEGENGINE_OK: return "no error";
    case NEGENGINE_ERROR_ARGUMENT: return "a null pointer, a negative size or an unknown constant";
    case NEGENGINE_ERROR_SHAPE: return "sizes that do not fit each other or exceed a limit (16777216 channels, 131072 for an int8 search, 2^31 tokens)";
    case NEGENGINE_ERROR_REFERENCE: return "an entry of references is not an image of the bank";
    case NEGENGINE_ERROR_INDEX: return "an entry of index is not a token of the references";
    case NEGENGINE_ERROR_UNSUPPORTED: return "the instruction set in use lacks this search";
    case NEGENGINE_ERROR_MEMORY: return "no memory for the workspace";
    default: return "unknown status";
  }
}

negengine_workspace* negengine_workspace_create(size_t limit) {
  negengine_workspace* workspace = new (std::nothrow) negengine_workspace();
  if (workspace != nullptr) workspace->limit = limit;
  return workspace;
}

void negengine_workspace_destroy(negengine_workspace* workspace) { delete workspace; }

size_t negengine_workspace_bytes(const negengine_workspace* workspace) {
  if (workspace == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(workspace->mutex);
  return workspace->bytes();
}

size_t negengine_workspace_peak(const negengine_workspace* workspace) {
  if (workspace == nullptr) return 0;
  const std::lock_guard<std::mutex> lock(workspace->mutex);
  return workspace->peak;
}

void negengine_workspace_release(negengine_workspace* workspace) {
  if (workspace == nullptr) return;
  const std::lock_guard<std::mutex> lock(workspace->mutex);
  workspace->release();
}

void negengine_workspace_use(negengine_workspace* workspace, negengine_parallel parallel) {
  if (workspace == nullptr) return;
  const std::lock_guard<std::mutex> lock(workspace->mutex);
  workspace->pool.use(parallel);
}

int negengine_isa(void) { return isa(); }
const char* negengine_isa_name(int isa) { return isa_name(isa); }
int negengine_set_isa(int isa) { return set_isa(isa) ? NEGENGINE_OK : NEGENGINE_ERROR_UNSUPPORTED; }

int negengine_supports(int search) { return negengine_precision(NEGENGINE_F32, search) != nullptr; }

const char* negengine_precision(int dtype, int search) {
  if (dtype < NEGENGINE_F32 || dtype > NEGENGINE_F16 || search < NEGENGINE_AUTO || search > NEGENGINE_SEARCH_INT8) return nullptr;
  negengine_problem problem = {};
  problem.dtype = dtype;
  problem.search = search;
  const Kernels available = kernels();
  const Format format = format_of(problem, available);
  if (available.tiles[int(format)].run == nullptr) return nullptr;
  return format == Format::f32 ? "fp32" : format == Format::bf16 ? "bf16" : "int8";
}

int negengine_match(negengine_workspace* workspace, const negengine_problem* problem, float* cosine, int32_t* index) {
  return with(workspace, problem, [&](Call& call) -> int {
    if (problem->B * problem->T > 0 && (cosine == nullptr || index == nullptr)) return NEGENGINE_ERROR_ARGUMENT;
    match(call, cosine, index);
    return NEGENGINE_OK;
  });
}

int negengine_merge(negengine_workspace* workspace, const negengine_problem* problem, const int32_t* index, const uint8_t* gate,
                    const double* alpha, void* y, int64_t y_image, int64_t y_token) {
  return with(workspace, problem, [&](Call& call) -> int {
    if (!writable(*problem, y, y_image, y_token)) return NEGENGINE_ERROR_ARGUMENT;
    const int64_t rows = problem->B * problem->T;
    if (rows == 0) return NEGENGINE_OK;
    if (index == nullptr || gate == nullptr || alpha == nullptr) return NEGENGINE_ERROR_ARGUMENT;
    for (int64_t row = 0; row < rows; row++)
      if (gate[row] && (index[row] < 0 || index[row] >= problem->K * problem->M ||
                        call.image(row / problem->T, index[row] / problem->M) < 0))
        return NEGENGINE_ERROR_INDEX;
    merge(call, index, gate, alpha, 1, static_cast<char*>(y), y_image, y_token);
    return NEGENGINE_OK;
  });
}

int negengine_negtome(negengine_workspace* workspace, const negengine_problem* problem, const negengine_merge_arguments* m) {
  return with(workspace, problem, [&](Call& call) -> int {
    if (m == nullptr || m->threshold == nullptr || m->stats_entry < 0 || m->alpha_image < 0 || m->keep_image < 0 || m->keep_token < 0)
      return NEGENGINE_ERROR_ARGUMENT;
    const int64_t B = problem->B, T = problem->T;
    if (!writable(*problem, m->y, m->y_image, m->y_token) || (B * T > 0 && m->alpha == nullptr)) return NEGENGINE_ERROR_ARGUMENT;
    float* cosine = workspace->buffers[negengine_workspace::cosines].get<float>(B * T);
    int32_t* index = workspace->buffers[negengine_workspace::indices].get<int32_t>(B * T);
    uint8_t* gate = workspace->buffers[negengine_workspace::gates].get<uint8_t>(B * T);
    match(call, cosine, index);
    const float threshold = static_cast<float>(*m->threshold);
    int64_t merged = 0, eligible = 0;
    for (int64_t b = 0; b < B; b++) {
      bool some = false;
      for (int64_t slot = 0; slot < problem->K; slot++) some = some || call.image(b, slot) >= 0;
      eligible += some ? T : 0;
      for (int64_t t = 0; t < T; t++) {
        const int64_t row = b * T + t;
        const bool kept = m->keep == nullptr || m->keep[b * m->keep_image + t * m->keep_token] != 0;
        gate[row] = index[row] >= 0 && cosine[row] > threshold && kept;
        merged += gate[row];
      }
    }
    merge(call, index, gate, m->alpha, m->alpha_image, static_cast<char*>(m->y), m->y_image, m->y_token);
    if (m->stats != nullptr) {
      m->stats[0] += merged;
      m->stats[m->stats_entry] += eligible;
      m->stats[2 * m->stats_entry] += 1;
    }
    return NEGENGINE_OK;
  });
}

}  // extern "C"
