// Runs random calls twice with different threads and instruction sets, in place and not, several at once, and checks them.
// Usage: negengine_driver [calls] [seed]
#include <thread>

#include "guidance.hpp"

namespace {

struct Result {
  std::vector<float> cosine;
  std::vector<int32_t> index;
  std::vector<char> y;
  int64_t stats[3] = {};
};

Result run(negengine_workspace* workspace, Case c, bool in_place) {
  c.point();
  const size_t rows = static_cast<size_t>(c.problem.B * c.problem.T);
  Result result = {std::vector<float>(rows), std::vector<int32_t>(rows), {}, {}};
  REQUIRE(negengine_match(workspace, &c.problem, result.cosine.data(), result.index.data()) == NEGENGINE_OK);
  c.check(result.cosine.data(), result.index.data());
  Tensor other = c.x;
  Tensor& y = in_place ? c.x : other;
  const negengine_merge_arguments m = c.merge(y, result.stats);
  REQUIRE(negengine_negtome(workspace, &c.problem, &m) == NEGENGINE_OK);
  result.y = y.data;
  return result;
}

void calls(int64_t count, uint64_t seed, negengine_workspace* workspace) {
  Random random(seed);
  for (int64_t i = 0; i < count; i++) {
    Case c = Case::draw(random, 70);
    if (!negengine_supports(c.problem.search)) c.problem.search = NEGENGINE_AUTO;
    const Result a = run(workspace, c, false);
    c.problem.threads = static_cast<int32_t>(1 + below(random, 4));
    const Result b = run(workspace, c, true);
    REQUIRE(a.cosine == b.cosine && a.index == b.index && a.y == b.y);
    REQUIRE(std::equal(a.stats, a.stats + 3, b.stats) && a.stats[2] == 1);
    guidance_call(random, workspace);
  }
}

void parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 0; i < threads; i++) team.emplace_back(body, data);  // one more than the callers of body may be
  body(data);
  for (std::thread& member : team) member.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const int best = negengine_isa();
  for (int isa = 0; isa <= best; isa++) {
    REQUIRE(negengine_set_isa(isa) == NEGENGINE_OK);
    negengine_workspace* shared = negengine_workspace_create(1 << 20);
    REQUIRE(shared != nullptr);
    std::thread others[2];
    for (int i = 0; i < 2; i++) others[i] = std::thread(calls, count / 4, seed + 1 + static_cast<uint64_t>(i), shared);
    negengine_workspace* own = negengine_workspace_create(0);
    calls(count / 2, seed, own);
    negengine_workspace_use(own, parallel);
    calls(count / 2, seed + 3, own);
    REQUIRE(negengine_workspace_bytes(own) == 0 && negengine_workspace_peak(own) > 0);
    for (std::thread& other : others) other.join();
    negengine_workspace_release(shared);
    REQUIRE(negengine_workspace_bytes(shared) == 0);
    negengine_workspace_destroy(own);
    negengine_workspace_destroy(shared);
    std::printf("%s: ok\n", negengine_isa_name(isa));
  }
  return 0;
}
