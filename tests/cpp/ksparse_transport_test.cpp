#include "ksparse_transport.h"

#include <numeric>

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E;
  int64_t size() const { return G * T * E; }
};

constexpr TransportOptions kAdam{4, 20, Solver::kAdam, 0.01, 1e-3, 1.0};
constexpr TransportOptions kLbfgs{4, 500, Solver::kLbfgs, 0.01, 1e-9, 1.0};

TransportOptions with_k(TransportOptions options, int64_t k) {
  options.k = k;
  return options;
}

TransportOptions with_iterations(TransportOptions options, int64_t iterations) {
  options.iterations = iterations;
  return options;
}

template <typename T>
std::vector<T> transport(
    const Shape& shape, const std::vector<T>& similarity, const TransportOptions& options) {
  Guarded<T> plan(shape.size());
  cpu::ksparse_transport(
      similarity.data(), plan.data(), shape.T, shape.E, options, 0, shape.G, Parallel{});
  EXPECT_TRUE(plan.fences_stand());
  return plan.values();
}

// The semi-dual of one group by its definition, to be maximised.
struct SemiDual {
  int64_t n, E, k;
  double gamma;
  std::vector<double> similarity;  // [n, E]

  double b() const { return static_cast<double>(n) / static_cast<double>(E); }

  // P_k by its definition: sorts the entries, and tries every size of the support for the
  // threshold.
  std::vector<double> project(const std::vector<double>& x) const {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return x[i] > x[j]; });
    double tau = 0;
    for (int64_t r = 1; r <= std::min(k, n); ++r) {
      double sum = 0;
      for (int64_t i = 0; i < r; ++i) sum += x[order[i]];
      if (1 + static_cast<double>(r) * x[order[r - 1]] > sum) {
        tau = (sum - 1) / static_cast<double>(r);
      }
    }
    std::vector<double> p(n, 0);
    for (int64_t i = 0; i < std::min(k, n); ++i) p[order[i]] = std::max(x[order[i]] - tau, 0.0);
    return p;
  }

  std::vector<double> plan(const std::vector<double>& alpha) const {
    std::vector<double> out(n * E), x(n);
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t t = 0; t < n; ++t) x[t] = (alpha[t] + similarity[t * E + e]) / (gamma * b());
      const auto p = project(x);
      for (int64_t t = 0; t < n; ++t) out[t * E + e] = b() * p[t];
    }
    return out;
  }

  // 1 - the row sums of the plan.
  std::vector<double> gradient(const std::vector<double>& alpha) const {
    std::vector<double> out(n, 1);
    const auto moved = plan(alpha);
    for (int64_t i = 0; i < n * E; ++i) out[i / E] -= moved[i];
    return out;
  }

  // The objective for the plan `moved`. This value is the semi-dual if the columns of the plan are
  // the maximisers b p.
  double value(const std::vector<double>& alpha, const std::vector<double>& moved) const {
    double sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += alpha[t];
    for (int64_t i = 0; i < n * E; ++i) {
      sum -= (alpha[i / E] + similarity[i]) * moved[i] - gamma / 2 * moved[i] * moved[i];
    }
    return sum;
  }
  double value(const std::vector<double>& alpha) const { return value(alpha, plan(alpha)); }

  // Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1).
  std::vector<double> adam(int64_t iterations, double rate, double tolerance) const {
    std::vector<double> alpha(n, 0), m(n, 0), v(n, 0);
    for (int64_t i = 1; i <= iterations; ++i) {
      const auto g = gradient(alpha);
      for (int64_t t = 0; t < n; ++t) {
        m[t] = 0.9 * m[t] + 0.1 * g[t];
        v[t] = 0.999 * v[t] + 0.001 * g[t] * g[t];
        const double mean = m[t] / (1 - std::pow(0.9, i)), square = v[t] / (1 - std::pow(0.999, i));
        alpha[t] += rate * mean / (std::sqrt(square) + 1e-8);
      }
      if (std::sqrt(inner(g, g)) <= tolerance) break;
    }
    return alpha;
  }

  // Computes alpha from the plan `moved`, up to a constant. Adding a constant to alpha changes no
  // plan. Within a column, alpha[t] + S[t, e] - gamma plan[t, e] is the same number at all positive
  // entries. Returns an empty vector if the plan consists of separate blocks.
  std::vector<double> alpha_of(const std::vector<double>& moved) const {
    std::vector<double> alpha(n, kNaN<double>), column(E, kNaN<double>);
    alpha[0] = 0;
    for (int64_t sweep = 0; sweep < n + E; ++sweep) {
      for (int64_t i = 0; i < n * E; ++i) {
        if (moved[i] <= 0) continue;
        double &a = alpha[i / E], &c = column[i % E];
        const double off = similarity[i] - gamma * moved[i];
        if (std::isnan(c) && !std::isnan(a)) c = a + off;
        if (std::isnan(a) && !std::isnan(c)) a = c - off;
      }
    }
    for (const double a : alpha) {
      if (std::isnan(a)) return {};
    }
    return alpha;
  }
};

SemiDual semi_dual(const Shape& shape, const std::vector<double>& similarity, int64_t k) {
  return {shape.T, shape.E, k, 1.0, similarity};
}

// Expects column sums of n/E, at most k non-zeros per column, and no negative entry.
template <typename T>
void expect_columns(const Shape& shape, const std::vector<T>& plan, int64_t k, double n) {
  for (int64_t g = 0; g < shape.G; ++g) {
    for (int64_t e = 0; e < shape.E; ++e) {
      double sum = 0;
      int64_t positive = 0;
      for (int64_t t = 0; t < shape.T; ++t) {
        const T value = plan[(g * shape.T + t) * shape.E + e];
        EXPECT_GE(value, 0);
        sum += value;
        positive += value > 0;
      }
      const double wanted = n / static_cast<double>(shape.E);
      EXPECT_NEAR(sum, wanted, kRounding<T> * wanted) << "group " << g << " expert " << e;
      EXPECT_LE(positive, k);
    }
  }
}

double worst_row(const Shape& shape, const std::vector<double>& plan) {
  double worst = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    double sum = 0;
    for (int64_t e = 0; e < shape.E; ++e) sum += plan[t * shape.E + e];
    worst = std::max(worst, std::abs(sum - 1));
  }
  return worst;
}

template <typename T>
class KsparseTransport : public ::testing::Test {};
TYPED_TEST_SUITE(KsparseTransport, Floats);

TYPED_TEST(KsparseTransport, ColumnConstraintsHoldForAnySolverAndIterations) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{2, 12, 4}, {1, 1, 1}, {1, 1, 3}, {1, 5, 1}, {2, 30, 3}}) {
    const auto similarity = uniform<T>(shape.size(), 1, 0, 1), ties = tied<T>(shape.size(), 2);
    for (const int64_t k : {1, 2, 5, 30}) {
      if (k > shape.T) continue;
      for (const int64_t iterations : {0, 1, 20, 60}) {
        SCOPED_TRACE(::testing::Message() << "T " << shape.T << " k " << k << " I " << iterations);
        for (const auto& solver : {kAdam, kLbfgs}) {
          const auto options = with_iterations(with_k(solver, k), iterations);
          const double n = static_cast<double>(shape.T);
          expect_columns(shape, transport(shape, similarity, options), k, n);
          expect_columns(shape, transport(shape, ties, options), k, n);
        }
      }
    }
  }
}

TYPED_TEST(KsparseTransport, AdamsFirstStepByHand) {
  using T = TypeParam;
  // b = 1, k = 1. At alpha = 0 both experts take token 0 (expert 1 by the tie rule). The row sums
  // are 2 and 0, and the gradient is (-1, 1). Adam's first step is the sign of the gradient times
  // the rate: at alpha = (-0.01, 0.01), expert 1 takes token 1.
  const std::vector<T> similarity{1, 0, T{1} / 2, 0};
  const auto plan = [&](int64_t iterations) {
    return transport<T>({1, 2, 2}, similarity, with_iterations(with_k(kAdam, 1), iterations));
  };
  EXPECT_EQ(plan(0), (std::vector<T>{1, 1, 0, 0}));
  EXPECT_EQ(plan(1), (std::vector<T>{1, 0, 0, 1}));
  // b = 2, k = 2. u = (0.1, 0) gives p = (0.55, 0.45) and the gradient (-0.1, 0.1). One step of 0.1
  // makes the entries equal, up to the 1e-8 in Adam's denominator.
  TransportOptions options{2, 0, Solver::kAdam, 0.1, 0, 1.0};
  const std::vector<double> pair{0.2, 0};
  expect_near(transport<double>({1, 2, 1}, pair, options), std::vector<double>{1.1, 0.9}, 1e-15);
  options.iterations = 1;
  const double step = 0.1 * 0.1 / (0.1 + 1e-8);
  expect_near(
      transport<double>({1, 2, 1}, pair, options), std::vector<double>{1.1 - step, 0.9 + step},
      1e-14);
}

TYPED_TEST(KsparseTransport, FloatIsTheRoundedFloat64) {
  using T = TypeParam;
  const Shape shape{2, 16, 4};
  const auto similarity = uniform<T>(shape.size(), 3, 0, 1);
  const std::vector<double> exact(similarity.begin(), similarity.end());
  for (const auto& options : {kAdam, kLbfgs}) {
    const auto wanted = transport(shape, exact, options);
    EXPECT_EQ(transport(shape, similarity, options), std::vector<T>(wanted.begin(), wanted.end()));
  }
}

TYPED_TEST(KsparseTransport, AbsentTokensAreNotCounted) {
  using T = TypeParam;
  const Shape shape{1, 10, 3}, present{1, 8, 3};
  const auto absent = [](int64_t t) { return t == 0 || t == 6; };
  auto similarity = uniform<T>(shape.size(), 4, 0, 1);
  std::vector<T> kept;
  for (int64_t i = 0; i < shape.size(); ++i) {
    if (absent(i / 3)) {
      similarity[i] = -kInf<T>;
    } else {
      kept.push_back(similarity[i]);
    }
  }
  for (const int64_t k : {2, 5, 8}) {
    for (const auto& solver : {kAdam, kLbfgs}) {
      const auto options = with_k(solver, k);
      const auto plan = transport(shape, similarity, options);
      expect_columns(shape, plan, k, 8);
      std::vector<T> rest;
      for (int64_t i = 0; i < shape.size(); ++i) {
        if (absent(i / 3)) {
          EXPECT_EQ(plan[i], 0);
        } else {
          rest.push_back(plan[i]);
        }
      }
      EXPECT_EQ(rest, transport(present, kept, options));
    }
  }
  // k is larger than the number of present tokens.
  expect_columns(shape, transport(shape, similarity, with_k(kAdam, 10)), 8, 8);
}

TYPED_TEST(KsparseTransport, AllTokensAbsent) {
  using T = TypeParam;
  const std::vector<T> similarity(6, -kInf<T>), zeros(6, 0);
  for (const auto& solver : {kAdam, kLbfgs}) {
    EXPECT_EQ(transport<T>({1, 3, 2}, similarity, with_k(solver, 2)), zeros);
  }
}

TYPED_TEST(KsparseTransport, MinusInfinityNeverGetsMass) {
  using T = TypeParam;
  const Shape shape{1, 8, 3};
  auto similarity = uniform<T>(shape.size(), 5, 0, 1);
  for (const int64_t i : {0, 5, 7, 20}) similarity[i] = -kInf<T>;
  for (const auto& solver : {kAdam, kLbfgs}) {
    const auto plan = transport(shape, similarity, with_k(solver, 8));
    expect_columns(shape, plan, 7, 8);
    for (const int64_t i : {0, 5, 7, 20}) EXPECT_EQ(plan[i], 0);
  }
}

TYPED_TEST(KsparseTransport, OnlyTheBadGroupIsNaN) {
  using T = TypeParam;
  const Shape shape{3, 6, 2};
  const auto good = uniform<T>(shape.size(), 6, 0, 1);
  for (const auto& solver : {kAdam, kLbfgs}) {
    const auto options = with_k(solver, 3);
    const auto wanted = transport(shape, good, options);
    for (const T bad : {kNaN<T>, kInf<T>}) {
      auto similarity = good;
      similarity[15] = bad;
      const auto plan = transport(shape, similarity, options);
      EXPECT_EQ(group(plan, 0, 12), group(wanted, 0, 12));
      EXPECT_TRUE(all_nan(group(plan, 1, 12))) << bad;
      EXPECT_EQ(group(plan, 2, 12), group(wanted, 2, 12));
    }
  }
}

TYPED_TEST(KsparseTransport, ExtremeValues) {
  using T = TypeParam;
  const Shape shape{1, 6, 2};
  for (const double scale : {1e4, 1e-4, 0.0}) {
    auto similarity = uniform<T>(shape.size(), 7, -scale, scale);
    for (const auto& solver : {kAdam, kLbfgs}) {
      expect_columns(shape, transport(shape, similarity, with_k(solver, 3)), 3, 6);
    }
  }
  const std::vector<T> denormal(shape.size(), std::numeric_limits<T>::denorm_min());
  expect_columns(shape, transport(shape, denormal, with_k(kAdam, 3)), 3, 6);
}

TYPED_TEST(KsparseTransport, EmptyShapes) {
  using T = TypeParam;
  for (const auto& solver : {kAdam, kLbfgs}) {
    for (const Shape& shape : {Shape{0, 3, 4}, {2, 0, 4}, {2, 3, 0}, {2, 0, 0}}) {
      EXPECT_TRUE(transport<T>(shape, {}, with_k(solver, 0)).empty());
    }
    const std::vector<T> similarity(6, 1), zeros(6, 0);
    EXPECT_EQ(transport<T>({1, 3, 2}, similarity, with_k(solver, 0)), zeros);
  }
}

TYPED_TEST(KsparseTransport, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const Shape shape{5, 9, 3};
  const auto similarity = uniform<T>(shape.size(), 8, 0, 1);
  for (const auto& solver : {kAdam, kLbfgs}) {
    const auto options = with_iterations(with_k(solver, 3), 10);
    expect_pieces<T>(shape.G, shape.T * shape.E, [&](int64_t begin, int64_t end, T* plan) {
      cpu::ksparse_transport(
          similarity.data(), plan, shape.T, shape.E, options, begin, end, Parallel{});
    });
  }
}

TEST(KsparseTransportAdam, TakesTheStepsOfAlgorithm1) {
  for (const Shape& shape : {Shape{1, 6, 3}, {1, 16, 4}, {1, 5, 7}}) {
    const auto similarity = uniform<double>(shape.size(), 9, 0, 1);
    for (const int64_t k : {int64_t{1}, int64_t{3}, shape.T}) {
      for (const int64_t iterations : {1, 2, 5, 20}) {
        for (const double gamma : {1.0, 0.3}) {
          SCOPED_TRACE(
              ::testing::Message() << "T " << shape.T << " k " << k << " I " << iterations);
          auto options = with_iterations(with_k(kAdam, k), iterations);
          options.gamma = gamma;
          const SemiDual dual{shape.T, shape.E, k, gamma, similarity};
          const auto alpha = dual.adam(iterations, 0.01, 1e-3);
          expect_near(transport(shape, similarity, options), dual.plan(alpha), 1e-9);
        }
      }
    }
  }
}

TEST(KsparseTransportAdam, StopsAfterTheUpdateThatMetTheTolerance) {
  const Shape shape{1, 8, 2};
  const auto similarity = uniform<double>(shape.size(), 10, 0, 1);
  auto options = with_iterations(with_k(kAdam, 8), 1000);
  options.tolerance = 1e9;  // the first gradient meets this, and its update is applied
  EXPECT_EQ(
      transport(shape, similarity, options),
      transport(shape, similarity, with_iterations(with_k(kAdam, 8), 1)));
  EXPECT_NE(
      transport(shape, similarity, options),
      transport(shape, similarity, with_iterations(with_k(kAdam, 8), 0)));
  // Groups stop independently: the second group would continue.
  const Shape two{2, 2, 1};
  const TransportOptions loose{2, 50, Solver::kAdam, 0.01, 0.5, 1.0};
  const std::vector<double> pair{0.2, 0, 2, 0};
  const auto plan = transport(two, pair, loose);
  EXPECT_EQ(group(plan, 0, 2), transport<double>({1, 2, 1}, {0.2, 0}, with_iterations(loose, 1)));
  EXPECT_EQ(group(plan, 1, 2), transport<double>({1, 2, 1}, {2, 0}, loose));
}

TEST(KsparseTransportLbfgs, ConvergesWhereTheSemiDualIsSmooth) {
  // With k = n there are no kinks, so the row sums converge to 1.
  for (const Shape& shape : {Shape{1, 12, 3}, {1, 40, 4}, {1, 4, 8}}) {
    const auto similarity = uniform<double>(shape.size(), 11, 0, 2);
    const auto plan = transport(shape, similarity, with_k(kLbfgs, shape.T));
    EXPECT_LT(worst_row(shape, plan), 1e-7);
  }
}

TEST(KsparseTransportLbfgs, IsAsGoodAsManyStepsOfAdam) {
  const Shape shape{1, 16, 4};
  int compared = 0;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    for (const int64_t k : {6, 10, 16}) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed << " k " << k);
      const auto similarity = uniform<double>(shape.size(), seed, 0, 1);
      const SemiDual dual = semi_dual(shape, similarity, k);
      const auto plan = transport(shape, similarity, with_k(kLbfgs, k));
      const auto alpha = dual.alpha_of(plan);
      if (alpha.empty()) continue;
      ++compared;
      // The columns of the plan are maximisers. At a kink, other maximisers are as good.
      EXPECT_NEAR(dual.value(alpha, plan), dual.value(alpha), 1e-9);
      EXPECT_GE(dual.value(alpha), dual.value(dual.adam(1000, 0.01, 0)) - 1e-4);
    }
  }
  EXPECT_GE(compared, 8);
}

}  // namespace
}  // namespace vmoe
