#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "negengine_cpu.h"

namespace negengine {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
constexpr int kCount = 5;

int best_of_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return NEGENGINE_ISA_PORTABLE;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return NEGENGINE_ISA_AVX2;
  if (!__builtin_cpu_supports("avx512vnni")) return NEGENGINE_ISA_AVX512;
  return __builtin_cpu_supports("avx512bf16") ? NEGENGINE_ISA_AVX512_BF16 : NEGENGINE_ISA_AVX512_VNNI;
#else
  return NEGENGINE_ISA_PORTABLE;
#endif
}

// A file compiled for an instruction set is called only where the processor has it: even returning a constant may use its registers.
int best_of_both(int processor) {
  if (processor < NEGENGINE_ISA_AVX2 || avx2_kernels() == nullptr) return NEGENGINE_ISA_PORTABLE;
  if (processor < NEGENGINE_ISA_AVX512 || avx512_kernels() == nullptr) return NEGENGINE_ISA_AVX2;
  if (processor < NEGENGINE_ISA_AVX512_VNNI || avx512_vnni_tile().run == nullptr) return NEGENGINE_ISA_AVX512;
  if (processor < NEGENGINE_ISA_AVX512_BF16 || avx512_bf16_tile().run == nullptr) return NEGENGINE_ISA_AVX512_VNNI;
  return NEGENGINE_ISA_AVX512_BF16;
}

int best() {
  static const int best = best_of_both(best_of_processor());
  return best;
}

std::atomic<int>& chosen() {
  static std::atomic<int> chosen = [] {
    const char* wanted = std::getenv("NEGENGINE_CPU_ISA");
    for (int i = 0; wanted != nullptr && i < best(); i++)
      if (std::strcmp(wanted, kNames[i]) == 0) return i;
    return best();
  }();
  return chosen;
}

}  // namespace

int isa() { return chosen(); }

const char* isa_name(int isa) { return isa >= 0 && isa < kCount ? kNames[isa] : nullptr; }

bool set_isa(int isa) {
  if (isa < 0 || isa > best()) return false;
  chosen() = isa;
  return true;
}

Kernels kernels() {
  const int level = isa();
  if (level == NEGENGINE_ISA_PORTABLE) return *portable_kernels();
  if (level == NEGENGINE_ISA_AVX2) return *avx2_kernels();
  Kernels result = *avx512_kernels();
  if (level >= NEGENGINE_ISA_AVX512_VNNI) result.tiles[int(Format::int8)] = avx512_vnni_tile();
  if (level >= NEGENGINE_ISA_AVX512_BF16) {
    result.tiles[int(Format::bf16)] = avx512_bf16_tile();
    result.dot_f32[NEGENGINE_BF16] = avx512_bf16_dot;
  }
  return result;
}

}  // namespace negengine
