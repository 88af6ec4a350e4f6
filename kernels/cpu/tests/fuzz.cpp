// Drives the C interface with arbitrary sizes, strides and constants, most of them wrong: each call must return a code, and
// touch no memory that is not its own. Meant to run under sanitizers. Usage: negengine_fuzz [seconds] [seed]
#include <chrono>

#include "guidance.hpp"

namespace {

int64_t odd_number(Random& random) {
  static const int64_t kOdd[] = {-1, 0, 1, 2, 63, 64, 65, 1 << 20, int64_t(1) << 31, int64_t(1) << 40, INT64_MAX, INT64_MIN};
  return kOdd[below(random, 12)];
}

// Breaks one field. False if the result may still be a right call that reads beyond its memory.
bool spoil(Random& random, Case& c, negengine_merge_arguments& m) {
  negengine_problem& p = c.problem;
  switch (below(random, 19)) {
    case 0: p.x = nullptr; return p.B * p.T > 0;
    case 1: p.bank = nullptr; return true;
    case 2: p.references = nullptr; return p.B > 0;
    case 3: p.B = -1 - below(random, 5); return true;
    case 4: p.T = INT64_MIN + below(random, 5); return true;
    case 5: p.D = below(random, 2) ? 0 : INT64_MAX; return true;
    case 6: p.R = -below(random, 3); return true;
    case 7: p.M = below(random, 2) ? 0 : int64_t(1) << 31; return true;
    case 8: p.K = below(random, 2) ? 0 : INT64_MAX; return true;
    case 9: p.x_image = -1; return true;
    case 10: p.bank_token = INT64_MIN; return true;
    case 11: p.dtype = static_cast<int32_t>(3 + below(random, 5)); return true;
    case 12: p.matching = static_cast<int32_t>(-1 - below(random, 5)); return true;
    case 13: p.search = static_cast<int32_t>(4 + below(random, 5)); return true;
    case 14: p.threads = static_cast<int32_t>(below(random, 2) ? -below(random, 3) : INT32_MAX); return true;
    case 15:
      if (c.references.empty()) return false;
      c.references[0] = static_cast<int32_t>(p.R + below(random, 5));
      return true;
    case 16: m.y_image += 1; return m.y == p.x && p.B > 1 && p.T > 0;
    case 17: m.y_token = -1 - below(random, 5); return true;
    default: m.threshold = nullptr; return true;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  const auto begin = std::chrono::steady_clock::now();
  const int best = negengine_isa();
  negengine_workspace* workspace = negengine_workspace_create(1 << 20);
  int64_t right = 0, wrong = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    REQUIRE(negengine_set_isa(static_cast<int>(below(random, best + 1))) == NEGENGINE_OK);
    if (below(random, 4) == 0) {
      guidance_call(random, workspace);
      continue;
    }
    Case c = Case::draw(random, below(random, 8) ? 40 : 200);
    const size_t rows = static_cast<size_t>(c.problem.B * c.problem.T);
    std::vector<float> cosine(rows);
    std::vector<int32_t> index(rows);
    std::vector<uint8_t> gate(rows, 1);
    int64_t stats[3] = {};
    const bool in_place = below(random, 2);
    Tensor other = c.x;
    Tensor& y = in_place ? c.x : other;
    negengine_merge_arguments m = c.merge(y, below(random, 2) ? stats : nullptr);
    if (below(random, 3) == 0) {
      if (!spoil(random, c, m)) continue;
      REQUIRE(negengine_negtome(workspace, &c.problem, &m) != NEGENGINE_OK);
      wrong++;
      continue;
    }
    const int status = negengine_match(workspace, &c.problem, cosine.data(), index.data());
    REQUIRE(status == (negengine_supports(c.problem.search) ? NEGENGINE_OK : NEGENGINE_ERROR_UNSUPPORTED));
    if (status != NEGENGINE_OK) continue;
    if (below(random, 4) == 0) c.check(cosine.data(), index.data());
    if (rows > 0 && below(random, 2)) index[static_cast<size_t>(below(random, static_cast<int64_t>(rows)))] = static_cast<int32_t>(odd_number(random));
    negengine_merge(workspace, &c.problem, index.data(), gate.data(), c.alpha.data(), y.data.data(), y.image, y.token);
    REQUIRE(negengine_negtome(workspace, &c.problem, &m) == NEGENGINE_OK);
    if (below(random, 16) == 0) negengine_workspace_release(workspace);
    right++;
  }
  negengine_workspace_destroy(workspace);
  REQUIRE(right > 0 && wrong > 0);
  std::printf("%lld right calls, %lld wrong ones\n", static_cast<long long>(right), static_cast<long long>(wrong));
  return 0;
}
