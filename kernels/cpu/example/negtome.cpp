// Push the tokens of three images away from those of a fourth, without Python or torch.
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "negengine_cpu.h"

int main() {
  constexpr int64_t kImages = 4, kTokens = 256, kChannels = 64;
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kImages * kTokens * kChannels);
  for (int64_t i = 0; i < kTokens * kChannels; i++) x[i] = normal(random);
  for (int64_t i = kTokens * kChannels; i < static_cast<int64_t>(x.size()); i++)
    x[i] = x[i % (kTokens * kChannels)] + 0.5f * normal(random);  // every image resembles the first

  const int32_t references[kImages] = {-1, 0, 0, 0};  // image 0 has none
  const double alpha[kImages] = {0.9, 0.9, 0.9, 0.9}, threshold = 0.65;
  int64_t stats[3] = {};

  negengine_problem problem = {};
  problem.x = problem.bank = x.data();
  problem.references = references;
  problem.B = problem.R = kImages;
  problem.T = problem.M = kTokens;
  problem.D = kChannels;
  problem.K = 1;
  problem.x_image = problem.bank_image = kTokens * kChannels;
  problem.x_token = problem.bank_token = kChannels;
  problem.references_image = problem.references_slot = 1;
  problem.dtype = NEGENGINE_F32;
  problem.matching = NEGENGINE_PAPER;
  problem.search = NEGENGINE_AUTO;
  const unsigned processors = std::thread::hardware_concurrency();
  problem.threads = processors > 0 ? static_cast<int32_t>(processors) : 1;

  negengine_merge_arguments merge = {};
  merge.y = x.data();
  merge.y_image = problem.x_image;
  merge.y_token = problem.x_token;
  merge.alpha = alpha;
  merge.alpha_image = 1;
  merge.threshold = &threshold;
  merge.stats = stats;
  merge.stats_entry = 1;

  negengine_workspace* workspace = negengine_workspace_create(64 << 20);
  if (workspace == nullptr) return 1;
  const int status = negengine_negtome(workspace, &problem, &merge);
  if (status != NEGENGINE_OK) {
    std::fprintf(stderr, "negengine: %s\n", negengine_status_text(status));
    return 1;
  }
  std::printf("%s: merged %lld of %lld tokens; workspace %zu bytes\n", negengine_isa_name(negengine_isa()),
              static_cast<long long>(stats[0]), static_cast<long long>(stats[1]), negengine_workspace_bytes(workspace));
  negengine_workspace_destroy(workspace);
  return 0;
}
