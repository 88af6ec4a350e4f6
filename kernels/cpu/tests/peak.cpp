// What this machine can do at this moment: pure loops of the search's instructions, one per thread.
// Usage: negengine_peak [threads]; prints instruction and operations per second, in billions.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define FOUR(op, a, b, c, d) op " %%zmm0, %%zmm1, %%zmm" #a "\n" op " %%zmm0, %%zmm1, %%zmm" #b "\n" op " %%zmm0, %%zmm1, %%zmm" #c "\n" op " %%zmm0, %%zmm1, %%zmm" #d "\n"
#define LOOP(op)                                                                                                           \
  asm volatile("vpxord %%zmm0, %%zmm0, %%zmm0\n vmovaps %%zmm0, %%zmm1\n 1:\n"                                             \
               FOUR(op, 8, 9, 10, 11) FOUR(op, 12, 13, 14, 15) FOUR(op, 16, 17, 18, 19) FOUR(op, 20, 21, 22, 23)           \
               FOUR(op, 24, 25, 26, 27) FOUR(op, 28, 29, 30, 31) "dec %0\n jnz 1b\n"                                       \
               : "+r"(count) : : "cc", "xmm0", "xmm1", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

static double seconds(int kind) {
  const auto begin = std::chrono::steady_clock::now();
  long count = 4000000;
  if (kind == 0) LOOP("vfmadd231ps");
  if (kind == 1) LOOP("vdpbf16ps");
  if (kind == 2) LOOP("vpdpbusd");
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const char* names[] = {"fp32", "bf16", "int8"};
  __builtin_cpu_init();
  const bool has[] = {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bf16") != 0,
                      __builtin_cpu_supports("avx512vnni") != 0};
  for (int kind = 0; kind < 3; kind++) {
    if (!has[kind]) continue;
    std::vector<double> each(static_cast<size_t>(threads));
    std::vector<std::thread> team;
    for (double& slot : each) team.emplace_back([&slot, kind] { slot = seconds(kind); });
    for (std::thread& member : team) member.join();
    double rate = 0;
    for (double slot : each) rate += 4e6 * 24 * 16 * (2 << kind) / slot / 1e9;
    std::printf("%s %.1f\n", names[kind], rate);
  }
  return 0;
}
#else
int main() { return 0; }
#endif
