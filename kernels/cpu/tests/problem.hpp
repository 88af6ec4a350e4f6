// Random problems for the driver and the fuzzer, and a plain float64 check of their results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "negengine_cpu.h"

#define REQUIRE(condition)                                                             \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                    \
    }                                                                                  \
  } while (false)

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

// A tensor [images, tokens, channels] in memory of exactly its size.
struct Tensor {
  int64_t images, tokens, channels, image, token;
  int dtype;
  std::vector<char> data;

  Tensor(int64_t images, int64_t tokens, int64_t channels, int dtype, int64_t gap, bool inside)
      : images(images), tokens(tokens), channels(channels), dtype(dtype) {
    token = inside ? images * (channels + gap) : channels + gap;
    image = inside ? channels + gap : tokens * token;
    const int64_t last = images > 0 && tokens > 0 ? (images - 1) * image + (tokens - 1) * token + channels : 0;
    data.resize(static_cast<size_t>(last * size()));
  }
  int64_t size() const { return dtype == NEGENGINE_F32 ? 4 : 2; }
  char* at(int64_t i, int64_t t) { return data.data() + (i * image + t * token) * size(); }

  double get(int64_t i, int64_t t, int64_t k) {
    const char* p = at(i, t) + k * size();
    if (dtype == NEGENGINE_F32) {
      float value;
      std::memcpy(&value, p, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    if (dtype == NEGENGINE_BF16) {
      const uint32_t bits = uint32_t(half) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : std::ldexp(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
    return half & 0x8000 ? -magnitude : magnitude;
  }
  void set(int64_t i, int64_t t, int64_t k, float value) {  // truncated: any value will do
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    char* p = at(i, t) + k * size();
    if (dtype == NEGENGINE_F32) {
      std::memcpy(p, &bits, 4);
      return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == NEGENGINE_F16) {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000), fraction = static_cast<uint16_t>(bits >> 13 & 1023);
      half = exponent >= 31 ? (std::isnan(value) ? 0x7e00 : 0x7c00) | sign : exponent <= 0 ? sign : sign | exponent << 10 | fraction;
    }
    std::memcpy(p, &half, 2);
  }
  void fill(Random& random) {
    std::normal_distribution<float> normal;
    static const float kOdd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e30f, 1e-30f, 1e-44f, 3e38f};
    const int64_t kind = below(random, 6);
    for (int64_t i = 0; i < images; i++)
      for (int64_t t = 0; t < tokens; t++) {
        const float scale = kind == 1 ? std::ldexp(1.0f, static_cast<int>(below(random, 240)) - 120) : 1.0f;
        const bool odd = kind == 2 && below(random, 4) == 0;
        for (int64_t k = 0; k < channels; k++) {
          float value = scale * normal(random);
          if (kind == 3) value = static_cast<float>(below(random, 3) - 1);
          if (kind == 4 && k % 7 == 0) value *= 20;
          if (odd && below(random, 8) == 0) value = kOdd[below(random, 9)];
          set(i, t, k, value);
        }
        if (kind == 5 && t > 0) std::memmove(at(i, t), at(i, below(random, t)), static_cast<size_t>(channels * size()));
      }
  }
};

inline double cosine(Tensor& a, int64_t ai, int64_t at, Tensor& b, int64_t bi, int64_t bt) {
  double dot = 0, aa = 0, bb = 0;
  for (int64_t k = 0; k < a.channels; k++) {
    const double x = a.get(ai, at, k), y = b.get(bi, bt, k);
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  return dot / (std::max(std::sqrt(aa), 1e-12) * std::max(std::sqrt(bb), 1e-12));
}

inline bool finite(Tensor& a, int64_t i, int64_t t) {
  for (int64_t k = 0; k < a.channels; k++)
    if (!std::isfinite(a.get(i, t, k))) return false;
  return true;
}

// A call with everything that it points to.
struct Case {
  Tensor x, bank;
  bool own;
  std::vector<int32_t> references;
  std::vector<uint8_t> mask, keep;
  std::vector<double> alpha;
  double threshold;
  negengine_problem problem = {};

  static Case draw(Random& random, int64_t most) {
    const auto size = [&](int64_t n) { return 1 + below(random, below(random, 2) ? n : std::min<int64_t>(n, 9)); };
    const int64_t B = below(random, 8) ? 1 + below(random, 4) : 0, T = below(random, 16) ? size(most) : 0, D = size(2 * most);
    const int dtype = static_cast<int>(below(random, 3));
    const bool release = T > 0 && below(random, 4) == 0, own = T > 0 && B > 0 && below(random, 2);
    const int64_t R = own ? B : 1 + below(random, 3), M = release || own ? T : size(most), K = release ? 1 : 1 + below(random, 3);
    Case c = {Tensor(B, T, D, dtype, below(random, 3), below(random, 2)), Tensor(R, M, D, dtype, below(random, 3), below(random, 2)),
              own, {}, {}, {}, {}, 0};
    c.x.fill(random);
    c.bank.fill(random);
    for (int64_t i = 0; i < B * K; i++) c.references.push_back(static_cast<int32_t>(below(random, R + 1) - 1));
    if (below(random, 2))
      for (int64_t i = 0; i < R * M; i++) c.mask.push_back(below(random, 3) > 0);
    if (below(random, 2))
      for (int64_t i = 0; i < B * T; i++) c.keep.push_back(below(random, 3) > 0);
    for (int64_t i = 0; i < B; i++) c.alpha.push_back(static_cast<double>(below(random, 5)) - 1.9);
    c.threshold = static_cast<double>(below(random, 5)) / 2 - 1;
    negengine_problem& p = c.problem;
    p.B = B, p.T = T, p.D = D, p.R = R, p.M = M, p.K = K;
    p.x_image = c.x.image, p.x_token = c.x.token;
    p.bank_image = own ? c.x.image : c.bank.image, p.bank_token = own ? c.x.token : c.bank.token;
    p.references_image = K, p.references_slot = 1;
    p.mask_image = M, p.mask_token = 1;
    p.dtype = dtype, p.matching = release ? NEGENGINE_RELEASE : NEGENGINE_PAPER;
    p.search = static_cast<int32_t>(below(random, 4));
    p.threads = static_cast<int32_t>(1 + below(random, 4));
    c.point();
    return c;
  }
  void point() {
    problem.x = x.data.data();
    problem.bank = own ? x.data.data() : bank.data.data();
    problem.references = references.data();
    problem.mask = mask.empty() ? nullptr : mask.data();
  }
  negengine_merge_arguments merge(Tensor& y, int64_t* stats) {
    negengine_merge_arguments m = {};
    m.y = y.data.data(), m.y_image = y.image, m.y_token = y.token;
    m.alpha = alpha.data(), m.alpha_image = 1, m.threshold = &threshold;
    m.keep = keep.empty() ? nullptr : keep.data(), m.keep_image = problem.T, m.keep_token = 1;
    m.stats = stats, m.stats_entry = 1;
    return m;
  }

  // The contract of the match, for every token; quantised searches may be 1e-2 short.
  void check(const float* best, const int32_t* index) {
    const negengine_problem& p = problem;
    const bool release = p.matching == NEGENGINE_RELEASE, exact = p.search < NEGENGINE_SEARCH_BF16;
    Tensor& r = own ? x : bank;
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t t = 0; t < p.T; t++) {
        double most = -std::numeric_limits<double>::infinity(), chosen = most;
        for (int64_t slot = 0; slot < p.K; slot++) {
          const int64_t image = references[static_cast<size_t>(b * p.K + slot)];
          for (int64_t j = 0; image >= 0 && j < p.M; j++) {
            const int64_t source = release ? j : t, target = release ? t : j;
            bool allowed = finite(x, b, source) && finite(r, image, target) && (!release || finite(r, image, source));
            allowed = allowed && (mask.empty() || mask[static_cast<size_t>(image * p.M + target)]);
            const bool here = index[b * p.T + t] == slot * p.M + j;
            REQUIRE(allowed || !here);
            if (!allowed) continue;
            const double value = cosine(x, b, source, r, image, target);
            most = std::max(most, value);
            if (here) chosen = value;
          }
        }
        REQUIRE((index[b * p.T + t] < 0) == std::isinf(most));
        if (std::isinf(most)) continue;
        REQUIRE(most - chosen <= (exact ? 1e-6 : 1e-2));
        REQUIRE(std::abs(best[b * p.T + t] - chosen) <= 2e-6);
      }
  }
};
