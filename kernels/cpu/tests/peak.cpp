// What this machine can do at this moment: pure loops of the search's instructions, one per thread.
// Usage: negengine_peak [threads]; prints loop and operations per second, in billions. "avx2" is fp32 in vectors of 256 bits.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define FOUR(op, v, a, b, c, d) \
  op " %%" v "0, %%" v "1, %%" v #a "\n" op " %%" v "0, %%" v "1, %%" v #b "\n" op " %%" v "0, %%" v "1, %%" v #c "\n" op " %%" v "0, %%" v "1, %%" v #d "\n"
#define LOOP(op, v, rest)                                                                                             \
  asm volatile("vxorps %%ymm0, %%ymm0, %%ymm0\n vmovaps %%ymm0, %%ymm1\n 1:\n"                                        \
               FOUR(op, v, 4, 5, 6, 7) FOUR(op, v, 8, 9, 10, 11) FOUR(op, v, 12, 13, 14, 15) rest "dec %0\n jnz 1b\n" \
               : "+r"(count) : : "cc", "xmm0", "xmm1", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",        \
                 "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
#define WIDE(op) LOOP(op, "zmm", FOUR(op, "zmm", 16, 17, 18, 19) FOUR(op, "zmm", 20, 21, 22, 23) FOUR(op, "zmm", 24, 25, 26, 27))

struct Loop {
  const char* name;
  double operations;  // a round
};
static const Loop kLoops[] = {{"fp32", 24 * 16 * 2}, {"bf16", 24 * 16 * 4}, {"int8", 24 * 16 * 8}, {"avx2", 12 * 8 * 2}};
static const long kRounds = 4000000;

static double seconds(int loop) {
  const auto begin = std::chrono::steady_clock::now();
  long count = kRounds;
  if (loop == 0) WIDE("vfmadd231ps");
  if (loop == 1) WIDE("vdpbf16ps");
  if (loop == 2) WIDE("vpdpbusd");
  if (loop == 3) LOOP("vfmadd231ps", "ymm", "");
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  __builtin_cpu_init();
  const bool has[] = {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bf16") != 0,
                      __builtin_cpu_supports("avx512vnni") != 0, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
  for (int loop = 0; loop < 4; loop++) {
    if (!has[loop]) continue;
    std::vector<double> each(static_cast<size_t>(threads));
    std::vector<std::thread> team;
    for (double& slot : each) team.emplace_back([&slot, loop] { slot = seconds(loop); });
    for (std::thread& member : team) member.join();
    double rate = 0;
    for (double slot : each) rate += static_cast<double>(kRounds) * kLoops[loop].operations / slot / 1e9;
    std::printf("%s %.1f\n", kLoops[loop].name, rate);
  }
  return 0;
}
#else
int main() { return 0; }
#endif
