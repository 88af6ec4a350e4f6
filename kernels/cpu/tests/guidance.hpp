// Random calls of guidance for the driver and the fuzzer, each checked in float64.
#pragma once

#include "problem.hpp"

// Ordinary values [n, size], perhaps with gaps between the rows.
inline Tensor rows(Random& random, int64_t n, int64_t size, int dtype) {
  Tensor t(1, n, size, dtype, below(random, 3), false);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < size; k++) t.set(0, i, k, normal(random));
  return t;
}

inline bool near(double a, double b, double scale, int dtype) {
  const double step = dtype == NEGENGINE_F32 ? 1e-5 : dtype == NEGENGINE_F16 ? 2e-3 : 1e-2;
  return std::abs(a - b) <= step * (1 + scale);
}

// Predictions with everything that they point to.
struct Predictions {
  Tensor conditional, negative, unconditional;
  bool guided;
  negengine_branches branches = {};

  static Predictions draw(Random& random, int64_t most) {
    const int dtype = static_cast<int>(below(random, 3));
    const int64_t n = below(random, 8) ? 1 + below(random, 4) : 0, size = below(random, 8) ? 1 + below(random, most) : 0;
    Predictions p = {rows(random, n, size, dtype), rows(random, n, size, dtype), rows(random, n, size, dtype), below(random, 2) == 0};
    negengine_branches& b = p.branches;
    b.n = n, b.size = size;
    b.conditional_image = p.conditional.token, b.negative_image = p.negative.token, b.unconditional_image = p.unconditional.token;
    b.guidance = static_cast<double>(below(random, 9));
    b.dtype = dtype, b.guide_negative = static_cast<int32_t>(below(random, 2));
    b.threads = static_cast<int32_t>(1 + below(random, 4));
    return p;
  }
  void point() {
    branches.conditional = conditional.data.data();
    branches.negative = negative.data.data();
    branches.unconditional = guided ? unconditional.data.data() : nullptr;
  }
  double base(int64_t i, int64_t k) { return mixed(conditional.get(0, i, k), i, k, guided); }
  double avoided(int64_t i, int64_t k) { return mixed(negative.get(0, i, k), i, k, guided && branches.guide_negative); }
  double mixed(double value, int64_t i, int64_t k, bool yes) {
    const double u = unconditional.get(0, i, k);
    return yes ? u + branches.guidance * (value - u) : value;
  }
};

inline void guide_call(Random& random, negengine_workspace* workspace) {
  Predictions p = Predictions::draw(random, 9000);
  p.point();
  const int64_t copies = 1 + below(random, 3);
  std::vector<double> strength;
  for (int64_t i = 0; i < p.branches.n; i++) strength.push_back(static_cast<double>(below(random, 30)) / 10);
  Tensor out(1, copies * p.branches.n, p.branches.size, p.branches.dtype, 0, false), again = out;
  REQUIRE(negengine_guide(workspace, &p.branches, strength.data(), copies, out.data.data()) == NEGENGINE_OK);
  p.branches.threads = 1 + p.branches.threads % 4;
  REQUIRE(negengine_guide(workspace, &p.branches, strength.data(), copies, again.data.data()) == NEGENGINE_OK);
  REQUIRE(out.data == again.data);
  for (int64_t i = 0; i < copies * p.branches.n; i++)
    for (int64_t k = 0; k < p.branches.size; k += 1 + below(random, 40)) {
      const int64_t image = i % p.branches.n;
      const double e = p.base(image, k), m = p.avoided(image, k), lambda = strength[static_cast<size_t>(image)];
      REQUIRE(near(out.get(0, i, k), e + lambda * (e - m), (1 + lambda) * (std::abs(e) + std::abs(m)), p.branches.dtype));
    }
  REQUIRE(negengine_guide(workspace, &p.branches, strength.data(), 0, out.data.data()) == NEGENGINE_ERROR_ARGUMENT);
  p.branches.dtype = 3;
  REQUIRE(negengine_guide(workspace, &p.branches, strength.data(), 1, out.data.data()) == NEGENGINE_ERROR_ARGUMENT);
}

inline void evidence_call(Random& random, negengine_workspace* workspace) {
  Predictions p = Predictions::draw(random, 9000);
  p.point();
  const int64_t n = p.branches.n, size = p.branches.size;
  Tensor x = rows(random, n, size, static_cast<int>(below(random, 3))), y = rows(random, n, size, static_cast<int>(below(random, 3)));
  negengine_transition t = {x.data.data(), y.data.data(), x.token, y.token, {1.2, -0.7, 0.4, 0.6}, below(random, 2) ? INFINITY : 1.0,
                            x.dtype, y.dtype};
  std::vector<double> sums(static_cast<size_t>(3 * n)), again = sums;
  REQUIRE(negengine_evidence(workspace, &p.branches, &t, sums.data()) == NEGENGINE_OK);
  p.branches.threads = 1 + p.branches.threads % 4;
  REQUIRE(negengine_evidence(workspace, &p.branches, &t, again.data()) == NEGENGINE_OK);
  REQUIRE(sums == again);
  for (int64_t i = 0; i < n; i++) {
    double of[2] = {}, scale = 0;
    for (int64_t k = 0; k < size; k++)
      for (int which = 0; which < 2; which++) {
        const double a = which ? p.base(i, k) : p.avoided(i, k), sample = x.get(0, i, k);
        const double x0 = std::max(-t.clip, std::min(t.clip, t.means[0] * sample + t.means[1] * a));
        const double d = y.get(0, i, k) - (t.means[2] * x0 + t.means[3] * sample);
        of[which] += d * d;
        scale += d * d + a * a;
      }
    for (int which = 0; which < 2; which++) REQUIRE(near(sums[static_cast<size_t>((1 + which) * n + i)], of[which], scale, 0));
    REQUIRE(near(sums[static_cast<size_t>(i)], of[0] - of[1], scale, 0));
  }
  t.clip = 0;
  REQUIRE(negengine_evidence(workspace, &p.branches, &t, sums.data()) == NEGENGINE_ERROR_ARGUMENT);
}

inline void nag_call(Random& random, negengine_workspace* workspace) {
  const int dtype = static_cast<int>(below(random, 3));
  const int64_t B = 1 + below(random, 3), T = below(random, 8) ? 1 + below(random, 20) : 0, D = 1 + below(random, 700);
  Tensor z(B, T, D, dtype, below(random, 3), below(random, 2)), away(B, T, D, dtype, below(random, 3), below(random, 2));
  std::normal_distribution<float> normal;
  for (Tensor* t : {&z, &away})
    for (int64_t i = 0; i < B * T; i++)
      for (int64_t k = 0; k < D; k++) t->set(i / T, i % T, k, below(random, 40) ? normal(random) : 0.0f);
  Tensor out(B, T, D, dtype, 0, false);
  negengine_nag_arguments a = {};
  a.positive = z.data.data(), a.negative = away.data.data(), a.out = out.data.data();
  a.B = B, a.T = T, a.D = D;
  a.positive_image = z.image, a.positive_token = z.token, a.negative_image = away.image, a.negative_token = away.token;
  a.out_image = out.image, a.out_token = out.token, a.other_image = away.image, a.other_token = away.token;
  a.scale = 5, a.tau = 2.5, a.alpha = 0.25;
  a.dtype = dtype, a.threads = static_cast<int32_t>(1 + below(random, 4));
  REQUIRE(negengine_nag(workspace, &a) == NEGENGINE_OK);
  for (int64_t i = 0; i < B * T; i++) {
    double size = 0, most = 0;
    for (int64_t k = 0; k < D; k++) {
      const double p = z.get(i / T, i % T, k), q = away.get(i / T, i % T, k);
      size += std::abs(5 * p - 4 * q);
      most += std::abs(p);
    }
    const double factor = size > 0 ? std::min(1.0, 2.5 * most / size) : 1;
    for (int64_t k = 0; k < D; k++) {
      const double p = z.get(i / T, i % T, k), q = away.get(i / T, i % T, k);
      REQUIRE(near(out.get(i / T, i % T, k), 0.25 * factor * (5 * p - 4 * q) + 0.75 * p, 2 * std::abs(p) + std::abs(q), dtype));
    }
  }
  a.threads = 1 + a.threads % 4;
  a.out = z.data.data(), a.out_image = z.image, a.out_token = z.token, a.other = away.data.data();
  REQUIRE(negengine_nag(workspace, &a) == NEGENGINE_OK);
  for (int64_t i = 0; i < B * T; i++)
    for (Tensor* t : {&z, &away})
      REQUIRE(std::memcmp(t->at(i / T, i % T), out.at(i / T, i % T), static_cast<size_t>(D * out.size())) == 0);
  a.out_token += 1;
  REQUIRE(B * T == 0 || (T == 1 && B == 1) || T == 1 || negengine_nag(workspace, &a) == NEGENGINE_ERROR_ARGUMENT);
  a.out_token = -1;
  REQUIRE(negengine_nag(workspace, &a) == NEGENGINE_ERROR_ARGUMENT);
}

// One field broken: each call must say so, and touch nothing.
inline void wrong_call(Random& random, negengine_workspace* workspace) {
  Predictions p = Predictions::draw(random, 50);
  p.point();
  negengine_branches& b = p.branches;
  if (b.n * b.size == 0) return;
  std::vector<double> sums(static_cast<size_t>(3 * b.n));
  negengine_transition t = {b.conditional, b.negative, 0, 0, {1, 1, 1, 1}, 1, b.dtype, b.dtype};
  negengine_nag_arguments a = {};
  a.positive = b.conditional, a.negative = b.negative, a.out = p.unconditional.data.data();
  a.B = 1, a.T = 1, a.D = b.size, a.scale = a.tau = a.alpha = 1, a.dtype = b.dtype, a.threads = 1;
  switch (below(random, 16)) {
    case 0: b.n = a.B = -1 - below(random, 5); break;
    case 1: b.size = a.D = INT64_MIN + below(random, 5); break;
    case 2: b.size = a.D = INT64_MAX; break;
    case 3: b.n = a.T = int64_t(1) << 41; break;
    case 4: b.conditional = a.positive = nullptr; break;
    case 5: b.negative = a.negative = nullptr; break;
    case 6: b.conditional_image = a.out_token = -1; break;
    case 7: b.unconditional_image = a.other_image = INT64_MIN; break;
    case 8: b.dtype = a.dtype = static_cast<int32_t>(3 + below(random, 5)); break;
    case 9: b.dtype = a.dtype = -1; break;
    case 10: b.threads = a.threads = static_cast<int32_t>(-below(random, 3)); break;
    case 11: b.threads = a.threads = INT32_MAX; break;
    case 12: t.clip = NAN, a.tau = -1, b.n = -1; break;
    case 13: t.sample_dtype = 7, a.alpha = INFINITY, b.n = -1; break;
    case 14: t.previous_image = -1, a.scale = NAN, b.n = -1; break;
    default: t.sample = nullptr, a.out = nullptr, b.threads = 0; break;
  }
  REQUIRE(negengine_guide(workspace, &b, sums.data(), 1, p.unconditional.data.data()) != NEGENGINE_OK);
  REQUIRE(negengine_evidence(workspace, &b, &t, sums.data()) != NEGENGINE_OK);
  REQUIRE(negengine_nag(workspace, &a) != NEGENGINE_OK);
  REQUIRE(negengine_guide(nullptr, &b, sums.data(), 1, sums.data()) == NEGENGINE_ERROR_ARGUMENT);
  REQUIRE(negengine_guide(workspace, nullptr, sums.data(), 1, sums.data()) == NEGENGINE_ERROR_ARGUMENT);
  REQUIRE(negengine_evidence(workspace, nullptr, &t, sums.data()) == NEGENGINE_ERROR_ARGUMENT);
  REQUIRE(negengine_nag(workspace, nullptr) == NEGENGINE_ERROR_ARGUMENT);
}

inline void guidance_call(Random& random, negengine_workspace* workspace) {
  switch (below(random, 4)) {
    case 0: return guide_call(random, workspace);
    case 1: return evidence_call(random, workspace);
    case 2: return nag_call(random, workspace);
    default: return wrong_call(random, workspace);
  }
}
