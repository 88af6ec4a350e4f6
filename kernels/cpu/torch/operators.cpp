// negengine's operators for C++ programs that run PyTorch without Python: libnegengine_torch. Their schemas are those that
// negengine/ops/negtome.py defines in Python, where this library must not be loaded.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "negengine_cpu.h"

namespace {

using at::Tensor;

int32_t dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return NEGENGINE_F32;
    case at::kBFloat16: return NEGENGINE_BF16;
    case at::kHalf: return NEGENGINE_F16;
    default: TORCH_CHECK_TYPE(false, "negengine takes float32, bfloat16 and float16, not ", x.scalar_type());
  }
}

int32_t named(const char* what, c10::string_view name, std::initializer_list<std::pair<const char*, int32_t>> known) {
  for (const auto& [text, value] : known)
    if (name == text) return value;
  TORCH_CHECK_VALUE(false, "unknown ", what, " '", std::string(name), "' on a CPU");
}

// Calls on one workspace exclude each other.
negengine_workspace* workspace() {
  static negengine_workspace* shared = negengine_workspace_create(64 << 20);
  TORCH_CHECK(shared != nullptr, "no memory for negengine's workspace");
  return shared;
}

void done(int status) { TORCH_CHECK(status == NEGENGINE_OK, "negengine: ", negengine_status_text(status)); }

Tensor adjacent(const Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

void same_device(const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(t.device().is_cpu(), name, " is on ", t.device(), ", x on cpu; they must agree");
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

negengine_problem problem_of(const Tensor& x, const Tensor& bank, const Tensor& references, const std::optional<Tensor>& mask,
                             c10::string_view matching, c10::string_view search) {
  TORCH_CHECK_VALUE(x.dim() == 3 && bank.dim() == 3, "x and the bank must have shape [images, tokens, channels]");
  same_device("the bank", bank, x.scalar_type(), {bank.size(0), bank.size(1), x.size(2)});
  TORCH_CHECK_VALUE(references.dim() == 2, "references must have shape [images, K], got ", references.sizes());
  same_device("references", references, at::kInt, {x.size(0), references.size(1)});
  if (mask) same_device("mask", *mask, at::kBool, {bank.size(0), bank.size(1)});
  negengine_problem p = {};
  p.x = x.const_data_ptr();
  p.bank = bank.const_data_ptr();
  p.references = references.const_data_ptr<int32_t>();
  p.B = x.size(0), p.T = x.size(1), p.D = x.size(2);
  p.R = bank.size(0), p.M = bank.size(1), p.K = references.size(1);
  p.x_image = x.stride(0), p.x_token = x.stride(1);
  p.bank_image = bank.stride(0), p.bank_token = bank.stride(1);
  p.references_image = references.stride(0), p.references_slot = references.stride(1);
  if (mask) {
    p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    p.mask_image = mask->stride(0), p.mask_token = mask->stride(1);
  }
  p.dtype = dtype_of(x);
  p.matching = named("matching", matching, {{"paper", NEGENGINE_PAPER}, {"release", NEGENGINE_RELEASE}});
  p.search = named("search", search,
                   {{"auto", NEGENGINE_AUTO}, {"exact", NEGENGINE_EXACT}, {"bf16", NEGENGINE_SEARCH_BF16}, {"int8", NEGENGINE_SEARCH_INT8}});
  p.threads = at::get_num_threads();
  return p;
}

void check_backend(const std::optional<c10::string_view>& backend) {
  TORCH_CHECK_VALUE(!backend || *backend == "cpu", "the backend in C++ is 'cpu'");
}

std::tuple<Tensor, Tensor> match(const Tensor& x, const std::optional<Tensor>& bank, const Tensor& references,
                                 const std::optional<Tensor>& mask, c10::string_view matching, c10::string_view search,
                                 std::optional<c10::string_view> backend, at::OptionalIntArrayRef) {
  check_backend(backend);
  const Tensor source = adjacent(x), sought = bank ? adjacent(*bank) : source;
  const negengine_problem p = problem_of(source, sought, references, mask, matching, search);
  Tensor cosine = at::empty({p.B, p.T}, x.options().dtype(at::kFloat)), index = at::empty({p.B, p.T}, x.options().dtype(at::kInt));
  done(negengine_match(workspace(), &p, cosine.mutable_data_ptr<float>(), index.mutable_data_ptr<int32_t>()));
  return {cosine, index};
}

void merge(Tensor y, const Tensor& x, const std::optional<Tensor>& bank, const Tensor& references, const Tensor& alpha,
           const Tensor& threshold, const std::optional<Tensor>& keep, const std::optional<Tensor>& stats,
           const std::optional<Tensor>& mask, c10::string_view matching, c10::string_view search) {
  const Tensor source = adjacent(x), sought = bank ? adjacent(*bank) : source;
  const negengine_problem p = problem_of(source, sought, references, mask, matching, search);
  same_device("alpha", alpha, at::kDouble, {p.B});
  same_device("threshold", threshold, at::kDouble, {1});
  if (keep) same_device("keep", *keep, at::kBool, {p.B, p.T});
  if (stats) same_device("stats", *stats, at::kLong, {3});
  const bool in_place = y.is_same(x);
  Tensor target = y.stride(2) == 1 ? y : in_place ? source : at::empty(x.sizes(), x.options());
  negengine_merge_arguments m = {};
  m.y = target.mutable_data_ptr();
  m.y_image = target.stride(0), m.y_token = target.stride(1);
  m.alpha = alpha.const_data_ptr<double>();
  m.alpha_image = alpha.stride(0);
  m.threshold = threshold.const_data_ptr<double>();
  if (keep) {
    m.keep = static_cast<const uint8_t*>(keep->const_data_ptr());
    m.keep_image = keep->stride(0), m.keep_token = keep->stride(1);
  }
  if (stats) {
    m.stats = stats->mutable_data_ptr<int64_t>();
    m.stats_entry = stats->stride(0);
  }
  done(negengine_negtome(workspace(), &p, &m));
  if (!target.is_same(y)) y.copy_(target);
}

Tensor negtome(const Tensor& x, const std::optional<Tensor>& bank, const Tensor& references, const Tensor& alpha,
               const Tensor& threshold, const std::optional<Tensor>& keep, const std::optional<Tensor>& mask,
               c10::string_view matching, c10::string_view search, std::optional<c10::string_view> backend,
               at::OptionalIntArrayRef) {
  check_backend(backend);
  Tensor y = at::empty(x.sizes(), x.options());
  merge(y, x, bank, references, alpha, threshold, keep, std::nullopt, mask, matching, search);
  return y;
}

void negtome_(Tensor& x, const std::optional<Tensor>& bank, const Tensor& references, const Tensor& alpha, const Tensor& threshold,
              const std::optional<Tensor>& keep, const std::optional<Tensor>& stats, const std::optional<Tensor>& mask,
              c10::string_view matching, c10::string_view search, std::optional<c10::string_view> backend, bool,
              at::OptionalIntArrayRef) {
  check_backend(backend);
  merge(x, x, bank, references, alpha, threshold, keep, stats, mask, matching, search);
}

}  // namespace

TORCH_LIBRARY(negengine, library) {
  library.def(
      "match(Tensor x, Tensor? bank, Tensor references, Tensor? mask, str matching, str search, str? backend, int[]? table=None)"
      " -> (Tensor, Tensor)");
  library.def(
      "negtome(Tensor x, Tensor? bank, Tensor references, Tensor alpha, Tensor threshold, Tensor? keep, Tensor? mask, "
      "str matching, str search, str? backend, int[]? table=None) -> Tensor");
  library.def(
      "negtome_(Tensor(a!) x, Tensor? bank, Tensor references, Tensor alpha, Tensor threshold, Tensor? keep, Tensor(b!)? stats, "
      "Tensor? mask, str matching, str search, str? backend, bool disjoint=False, int[]? table=None) -> ()");
}

TORCH_LIBRARY_IMPL(negengine, CPU, library) {
  library.impl("match", match);
  library.impl("negtome", negtome);
  library.impl("negtome_", negtome_);
}
