#include "sinkhorn.h"

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E;
  int64_t size() const { return G * T * E; }
};

struct Options {
  int64_t iterations = 20;
  double epsilon = 1;
  double tolerance = 0;
};

template <typename T>
struct Result {
  std::vector<T> plan;
  std::vector<double> history, error;
  std::vector<int32_t> steps;
};

template <typename T>
Result<T> sinkhorn(const Shape& shape, const std::vector<T>& logits, const Options& options = {}) {
  Guarded<T> plan(shape.size());
  Guarded<double> history(shape.G * options.iterations * shape.E), error(shape.G);
  Guarded<int32_t> steps(shape.G);
  cpu::sinkhorn(
      logits.data(), plan.data(), history.data(), error.data(), steps.data(), shape.T, shape.E,
      options.iterations, options.epsilon, options.tolerance, 0, shape.G, Parallel{});
  EXPECT_TRUE(
      plan.fences_stand() && history.fences_stand() && error.fences_stand() &&
      steps.fences_stand());
  return {plan.values(), history.values(), error.values(), steps.values()};
}

template <typename T>
std::vector<T> unrolled(
    const Shape& shape, const std::vector<T>& grad, const std::vector<T>& logits,
    const Options& options = {}) {
  const auto forward = sinkhorn(shape, logits, options);
  Guarded<T> out(shape.size());
  cpu::sinkhorn_backward(
      grad.data(), logits.data(), forward.history.data(), forward.steps.data(), out.data(), shape.T,
      shape.E, options.iterations, options.epsilon, 0, shape.G, Parallel{});
  EXPECT_TRUE(out.fences_stand());
  return out.values();
}

template <typename T>
std::vector<T> implicit(
    const Shape& shape, const std::vector<T>& grad, const std::vector<T>& plan,
    double epsilon = 1) {
  Guarded<T> out(shape.size());
  cpu::sinkhorn_implicit_backward(
      grad.data(), plan.data(), out.data(), shape.T, shape.E, epsilon, 0, shape.G, Parallel{});
  EXPECT_TRUE(out.fences_stand());
  return out.values();
}

// The definition without logarithms, for one group with small |M| and no masked token. Scales
// exp(M) by columns, then by rows.
template <typename T>
std::vector<double> scaled_kernel(
    int64_t tokens, int64_t E, const std::vector<T>& logits, int64_t iterations, double epsilon) {
  std::vector<long double> kernel, by_row(tokens, 1), by_column(E, 1);
  for (const T value : logits)
    kernel.push_back(std::exp(static_cast<long double>(value) / epsilon));
  for (int64_t i = 0; i < iterations; ++i) {
    for (int64_t e = 0; e < E; ++e) {
      long double sum = 0;
      for (int64_t t = 0; t < tokens; ++t) sum += kernel[t * E + e] * by_row[t];
      by_column[e] = static_cast<long double>(tokens) / E / sum;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      long double sum = 0;
      for (int64_t e = 0; e < E; ++e) sum += kernel[t * E + e] * by_column[e];
      by_row[t] = 1 / sum;
    }
  }
  std::vector<double> plan;
  for (int64_t i = 0; i < tokens * E; ++i) {
    plan.push_back(static_cast<double>(kernel[i] * by_row[i / E] * by_column[i % E]));
  }
  return plan;
}

template <typename T>
double column_error(const Shape& shape, const std::vector<T>& plan, int64_t g, double n) {
  double worst = 0;
  for (int64_t e = 0; e < shape.E; ++e) {
    double sum = 0;
    for (int64_t t = 0; t < shape.T; ++t) sum += plan[(g * shape.T + t) * shape.E + e];
    worst = std::max(worst, std::abs(sum - n / shape.E) / (n / shape.E));
  }
  return worst;
}

// Tolerance for plans whose exponents are float64 sums of numbers around 1e4, which cancel.
template <typename T>
constexpr double kRoundingOfLarge = std::max(kRounding<T>, 1e-11);

template <typename T>
class Sinkhorn : public ::testing::Test {};
TYPED_TEST_SUITE(Sinkhorn, Floats);

TYPED_TEST(Sinkhorn, MatchesTheScalingOfExpM) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1}, {2, 7, 3}, {3, 4, 8}, {1, 1, 5}, {1, 6, 1}, {2, 33, 16}}) {
    for (const double epsilon : {0.5, 1.0, 3.0}) {
      for (const int64_t iterations : {1, 2, 20}) {
        const auto logits = uniform<T>(shape.size(), 1);
        const auto result = sinkhorn(shape, logits, {iterations, epsilon, 0});
        for (int64_t g = 0; g < shape.G; ++g) {
          SCOPED_TRACE(::testing::Message() << "T " << shape.T << " E " << shape.E << " g " << g);
          const int64_t size = shape.T * shape.E;
          const auto plan = group(result.plan, g, size);
          expect_near(
              plan, scaled_kernel(shape.T, shape.E, group(logits, g, size), iterations, epsilon),
              kRounding<T>);
          EXPECT_EQ(result.steps[g], iterations);
          EXPECT_NEAR(
              result.error[g], column_error(shape, result.plan, g, static_cast<double>(shape.T)),
              4 * kRounding<T>);
        }
      }
    }
  }
}

TYPED_TEST(Sinkhorn, RowsSumToOneAfterAnyIterations) {
  using T = TypeParam;
  const Shape shape{2, 9, 5};
  const auto logits = uniform<T>(shape.size(), 2, -30, 30);
  for (const int64_t iterations : {1, 3, 20}) {
    const auto result = sinkhorn(shape, logits, {iterations, 1, 0});
    for (int64_t t = 0; t < shape.G * shape.T; ++t) {
      double sum = 0;
      for (int64_t e = 0; e < shape.E; ++e) sum += result.plan[t * shape.E + e];
      EXPECT_NEAR(sum, 1, kRounding<T>);
    }
  }
}

TYPED_TEST(Sinkhorn, PlanIsASoftmaxWithTheLastPotential) {
  using T = TypeParam;
  const Shape shape{2, 6, 4};
  const auto logits = uniform<T>(shape.size(), 3);
  for (const int64_t iterations : {7, 1000}) {  // 1000: long after convergence
    const auto result = sinkhorn(shape, logits, {iterations, 0.7, 0});
    std::vector<double> wanted;
    for (int64_t i = 0; i < shape.G * shape.T; ++i) {
      const double* h = &result.history[((i / shape.T + 1) * iterations - 1) * shape.E];
      double sum = 0;
      for (int64_t e = 0; e < shape.E; ++e) sum += std::exp(logits[i * shape.E + e] / 0.7 + h[e]);
      for (int64_t e = 0; e < shape.E; ++e) {
        wanted.push_back(std::exp(logits[i * shape.E + e] / 0.7 + h[e]) / sum);
      }
    }
    expect_near(result.plan, wanted, kRounding<T>);
    EXPECT_EQ(result.steps, std::vector<int32_t>(shape.G, iterations));
  }
}

TYPED_TEST(Sinkhorn, EqualLogitsGetEqualShares) {
  using T = TypeParam;
  const Shape shape{1, 6, 4};
  for (const T value : {T{0}, T{1e4}, -T{1e4}, std::numeric_limits<T>::denorm_min()}) {
    const auto result = sinkhorn(shape, std::vector<T>(shape.size(), value));
    expect_near(result.plan, std::vector<T>(shape.size(), T{1} / 4), kRoundingOfLarge<T>);
    EXPECT_NEAR(result.error[0], 0, 1e-11);
  }
}

TYPED_TEST(Sinkhorn, SmallDifferencesOfLogitsStayExact) {
  using T = TypeParam;
  // Logits small enough for exp(M), near 0 or far from 0. They are multiples of 1/64, so that they
  // are exact in float32, too.
  const Shape shape{1, 40, 8};
  auto logits = uniform<T>(shape.size(), 26, 0, 38);
  for (T& logit : logits) logit = std::round(logit * 64) / 64;
  const auto wanted = scaled_kernel(shape.T, shape.E, logits, 5, 1);
  for (const T shift : {0, -38, 42, 43, -80, -81, 8192, -8192}) {
    auto shifted = logits;
    for (T& logit : shifted) logit += shift;
    expect_near(sinkhorn(shape, shifted, {5, 1, 0}).plan, wanted, kRounding<T>);
  }
}

TYPED_TEST(Sinkhorn, LargeLogitsStayExact) {
  using T = TypeParam;
  // Adding a constant to an expert's logits changes nothing, from the first iteration on. The
  // logits are multiples of 1/2, so that the sum is exact in float32, too.
  const Shape shape{1, 8, 4};
  const auto logits = tied<T>(shape.size(), 4, 9);
  auto shifted = logits;
  for (int64_t i = 0; i < shape.size(); ++i) shifted[i] += (i % 4 % 2 ? 8192 : -8192);
  expect_near(sinkhorn(shape, shifted).plan, sinkhorn(shape, logits).plan, kRoundingOfLarge<T>);
  // With logits this large, the plan is a balanced assignment of tokens to experts.
  std::vector<T> hard(shape.size(), -T{1e4}), wanted(shape.size(), 0);
  for (int64_t t = 0; t < shape.T; ++t) hard[t * 4 + t % 4] = T{1e4}, wanted[t * 4 + t % 4] = 1;
  const auto result = sinkhorn(shape, hard);
  expect_near(result.plan, wanted, kRoundingOfLarge<T>);
  EXPECT_NEAR(result.error[0], 0, 1e-11);
}

TYPED_TEST(Sinkhorn, WideLogitsMatchTheDefinition) {
  using T = TypeParam;
  // Spreads below and above 200, the limit of the iteration on exp(M).
  const Shape shape{1, 8, 4};
  for (const double spread : {150.0, 199.0, 201.0, 400.0, 1000.0}) {
    for (const int64_t iterations : {1, 3, 20, 500}) {
      SCOPED_TRACE(::testing::Message() << "spread " << spread << ", " << iterations);
      auto logits = uniform<T>(shape.size(), 25, 0, spread);
      logits[3] = 0;
      logits[30] = static_cast<T>(spread);
      expect_near(
          sinkhorn(shape, logits, {iterations, 1, 0}).plan,
          scaled_kernel(8, 4, logits, iterations, 1), kRoundingOfLarge<T>);
    }
  }
}

TYPED_TEST(Sinkhorn, MasksLetPotentialsGrow) {
  using T = TypeParam;
  // Every token reaches two experts, and every token except the last prefers the second of the two.
  // The potentials grow from expert to expert, far beyond the range of the logits.
  const int64_t E = 12;
  std::vector<T> chain(E * E, -kInf<T>);
  for (int64_t t = 0; t < E; ++t) {
    chain[t * E + t] = -90;
    if (t + 1 < E) chain[t * E + t + 1] = 90;
  }
  // Three of four tokens reach only one expert, which has two places. So no plan exists, and the
  // potentials diverge by log(3/2) per iteration.
  std::vector<T> crowd{0, -kInf<T>, 0, -kInf<T>, 0, -kInf<T>, 0, 0};
  for (const int64_t iterations : {1, 20, 500, 5000}) {
    SCOPED_TRACE(::testing::Message() << iterations << " iterations");
    const Options options{iterations, 1, 0};
    expect_near(
        sinkhorn({1, E, E}, chain, options).plan, scaled_kernel(E, E, chain, iterations, 1),
        kRoundingOfLarge<T>);
    expect_near(
        sinkhorn({1, 4, 2}, crowd, options).plan, scaled_kernel(4, 2, crowd, iterations, 1),
        kRoundingOfLarge<T>);
    for (const T grad : unrolled({1, E, E}, uniform<T>(E * E, 26), chain, options)) {
      EXPECT_TRUE(std::isfinite(grad));
    }
    for (const T grad : unrolled({1, 4, 2}, uniform<T>(8, 27), crowd, options)) {
      EXPECT_TRUE(std::isfinite(grad));
    }
  }
}

TYPED_TEST(Sinkhorn, StopsAtTheTolerance) {
  using T = TypeParam;
  const Shape shape{3, 12, 4};
  auto logits = uniform<T>(shape.size(), 5);
  std::fill(logits.begin() + 48, logits.begin() + 96, T{0});  // group 1 converges at once
  const Options options{200, 1, 1e-3};
  const auto result = sinkhorn(shape, logits, options);
  EXPECT_EQ(result.steps[1], 1);
  for (int64_t g = 0; g < shape.G; ++g) {
    const int64_t steps = result.steps[g];
    ASSERT_TRUE(steps > 0 && steps < 200);
    EXPECT_LE(result.error[g], 1e-3);
    const Shape one{1, shape.T, shape.E};
    const auto alone = group(logits, g, 48);
    // The plan equals the plan after `steps` iterations, and one iteration fewer misses the
    // tolerance.
    EXPECT_EQ(group(result.plan, g, 48), sinkhorn(one, alone, {steps, 1, 0}).plan);
    if (steps > 1) {
      EXPECT_GT(sinkhorn(one, alone, {steps - 1, 1, 0}).error[0], 1e-3);
    }
    for (int64_t i = steps * shape.E; i < 200 * shape.E; ++i) {
      EXPECT_EQ(result.history[g * 200 * shape.E + i], 0);
    }
  }
}

TYPED_TEST(Sinkhorn, AbsentTokensAreNotCounted) {
  using T = TypeParam;
  const Shape shape{1, 7, 3}, present{1, 5, 3};
  auto logits = uniform<T>(shape.size(), 6), grad = uniform<T>(shape.size(), 7);
  std::vector<T> kept_logits, kept_grad;
  const auto absent = [](int64_t t) { return t == 0 || t == 4; };
  for (int64_t i = 0; i < shape.size(); ++i) {
    if (absent(i / 3)) {
      logits[i] = -kInf<T>;
    } else {
      kept_logits.push_back(logits[i]);
      kept_grad.push_back(grad[i]);
    }
  }
  // Absent rows are zeros, and the present rows are as if the absent rows did not exist.
  const auto expect_kept = [&](const std::vector<T>& all, const std::vector<T>& kept) {
    std::vector<T> rest;
    for (int64_t i = 0; i < shape.size(); ++i) {
      if (absent(i / 3)) {
        EXPECT_EQ(all[i], 0);
      } else {
        rest.push_back(all[i]);
      }
    }
    expect_near(rest, kept, kRounding<T>);
  };
  const auto result = sinkhorn(shape, logits), wanted = sinkhorn(present, kept_logits);
  expect_kept(result.plan, wanted.plan);
  EXPECT_NEAR(result.error[0], wanted.error[0], kRoundingOfLarge<T>);
  expect_kept(unrolled(shape, grad, logits), unrolled(present, kept_grad, kept_logits));
  expect_kept(implicit(shape, grad, result.plan), implicit(present, kept_grad, wanted.plan));
}

TYPED_TEST(Sinkhorn, AllTokensAbsent) {
  using T = TypeParam;
  const Shape shape{1, 3, 2};
  const std::vector<T> logits(6, -kInf<T>), grad(6, 1), zeros(6, 0);
  const auto result = sinkhorn(shape, logits, {20, 1, 1e-3});
  EXPECT_EQ(result.plan, zeros);
  EXPECT_EQ(result.error[0], 0);
  EXPECT_EQ(unrolled(shape, grad, logits), zeros);
  EXPECT_EQ(implicit(shape, grad, result.plan), zeros);
}

TYPED_TEST(Sinkhorn, MinusInfinityIsNeverChosen) {
  using T = TypeParam;
  const Shape shape{1, 6, 3};
  auto logits = uniform<T>(shape.size(), 8);
  for (const int64_t i : {0, 4, 5}) logits[i] = -kInf<T>;
  const auto result = sinkhorn(shape, logits, {200, 1, 0});
  const auto grad = unrolled(shape, uniform<T>(shape.size(), 9), logits);
  for (int64_t i = 0; i < shape.size(); ++i) {
    EXPECT_TRUE(std::isfinite(result.plan[i]) && std::isfinite(grad[i])) << i;
    EXPECT_TRUE(logits[i] != -kInf<T> || (result.plan[i] == 0 && grad[i] == 0)) << i;
  }
  EXPECT_NEAR(result.error[0], 0, 1e-9);
  // An expert that no token can reach stays empty, and the error shows it.
  for (int64_t t = 0; t < shape.T; ++t) logits[t * 3 + 1] = -kInf<T>, logits[t * 3] = 0;
  const auto closed = sinkhorn(shape, logits);
  for (int64_t t = 0; t < shape.T; ++t) EXPECT_EQ(closed.plan[t * 3 + 1], 0);
  EXPECT_GE(closed.error[0], 1);
  EXPECT_TRUE(std::isfinite(closed.error[0]));
}

TYPED_TEST(Sinkhorn, OnlyTheBadGroupIsNaN) {
  using T = TypeParam;
  const Shape shape{3, 4, 3};
  const auto good = uniform<T>(shape.size(), 10);
  const auto wanted = sinkhorn(shape, good).plan;
  for (const T bad : {kNaN<T>, kInf<T>}) {
    for (const int64_t iterations : {1, 2, 3, 20}) {
      for (const int64_t at : {12, 17, 23}) {
        SCOPED_TRACE(::testing::Message() << bad << " at " << at << ", " << iterations);
        auto logits = good;
        logits[at] = bad;
        const auto result = sinkhorn(shape, logits, {iterations, 1, 0});
        EXPECT_TRUE(all_nan(group(result.plan, 1, 12)));
        EXPECT_TRUE(std::isnan(result.error[1]));
        if (iterations == 20) {
          EXPECT_EQ(group(result.plan, 0, 12), group(wanted, 0, 12));
          EXPECT_EQ(group(result.plan, 2, 12), group(wanted, 2, 12));
        }
      }
    }
    EXPECT_TRUE(all_nan(sinkhorn<T>({1, 2, 2}, {bad, bad, bad, bad}).plan));
    EXPECT_TRUE(all_nan(sinkhorn<T>({1, 1, 2}, {bad, 0}).plan));
  }
}

TYPED_TEST(Sinkhorn, OnlyTheGradientOfTheBadGroupIsNaN) {
  using T = TypeParam;
  const Shape shape{3, 4, 3};
  const auto good = uniform<T>(shape.size(), 30), grad = uniform<T>(shape.size(), 31);
  const auto wanted = unrolled(shape, grad, good);
  for (const T bad : {kNaN<T>, kInf<T>}) {
    auto logits = good;
    logits[17] = bad;
    const auto actual = unrolled(shape, grad, logits);
    EXPECT_TRUE(all_nan(group(actual, 1, 12))) << bad;
    EXPECT_EQ(group(actual, 0, 12), group(wanted, 0, 12));
    EXPECT_EQ(group(actual, 2, 12), group(wanted, 2, 12));
  }
}

// A row of equal logits of any size keeps its sum, on exponentials and on logarithms.
TYPED_TEST(Sinkhorn, RowsOfLargeEqualLogitsSumToOne) {
  using T = TypeParam;
  const Shape shape{1, 6, 3};
  for (const double size : {1e10, 1e15, 1e16, 1e30}) {
    for (const bool by_row : {false, true}) {
      for (const bool by_column : {false, true}) {
        SCOPED_TRACE(::testing::Message() << size << ' ' << by_row << by_column);
        std::vector<T> logits(shape.size(), 0);
        for (int64_t i = 0; i < shape.size(); ++i) {
          if (by_row) logits[i] += static_cast<T>(i < 9 ? size : 0);
          if (by_column) logits[i] += static_cast<T>(i % 3 == 0 ? size : 0);
          if (!by_row && !by_column) logits[i] = static_cast<T>(size);
        }
        const auto result = sinkhorn(shape, logits);
        for (int64_t t = 0; t < shape.T; ++t) {
          double sum = 0;
          for (int64_t e = 0; e < shape.E; ++e) sum += result.plan[t * shape.E + e];
          EXPECT_NEAR(sum, 1, kRounding<T>);
        }
        // With by_column, the potentials of the columns are large, and so is their rounding error.
        EXPECT_TRUE(by_column || result.error[0] <= kRounding<T>) << result.error[0];
        EXPECT_NEAR(result.error[0], column_error(shape, result.plan, 0, 6.0), 4 * kRounding<T>);
      }
    }
  }
}

TYPED_TEST(Sinkhorn, EmptyShapes) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{0, 3, 4}, {2, 0, 4}, {2, 3, 0}, {2, 0, 0}}) {
    const auto result = sinkhorn<T>(shape, {});
    EXPECT_TRUE(result.plan.empty());
    for (const double error : result.error) EXPECT_EQ(error, 0);
    EXPECT_TRUE(unrolled<T>(shape, {}, {}).empty());
    EXPECT_TRUE(implicit<T>(shape, {}, {}).empty());
  }
}

TYPED_TEST(Sinkhorn, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const Shape shape{5, 6, 3};
  const int64_t I = 8, size = shape.T * shape.E;
  const auto logits = uniform<T>(shape.size(), 11), grad = uniform<T>(shape.size(), 12);
  const auto result = sinkhorn(shape, logits, {I, 1, 1e-2});
  std::vector<T> plan(shape.size());
  std::vector<double> history(shape.G * I * shape.E), error(shape.G);
  std::vector<int32_t> steps(shape.G);
  const auto run = [&](T* p, double* h, double* err, int32_t* s, int64_t begin, int64_t end) {
    cpu::sinkhorn(
        logits.data(), p, h, err, s, shape.T, shape.E, I, 1.0, 1e-2, begin, end, Parallel{});
  };
  expect_pieces<T>(shape.G, size, [&](int64_t begin, int64_t end, T* out) {
    run(out, history.data(), error.data(), steps.data(), begin, end);
  });
  expect_pieces<double>(shape.G, I * shape.E, [&](int64_t begin, int64_t end, double* out) {
    run(plan.data(), out, error.data(), steps.data(), begin, end);
  });
  expect_pieces<double>(shape.G, 1, [&](int64_t begin, int64_t end, double* out) {
    run(plan.data(), history.data(), out, steps.data(), begin, end);
  });
  expect_pieces<int32_t>(shape.G, 1, [&](int64_t begin, int64_t end, int32_t* out) {
    run(plan.data(), history.data(), error.data(), out, begin, end);
  });
  expect_pieces<T>(shape.G, size, [&](int64_t begin, int64_t end, T* out) {
    cpu::sinkhorn_backward(
        grad.data(), logits.data(), result.history.data(), result.steps.data(), out, shape.T,
        shape.E, I, 1.0, begin, end, Parallel{});
  });
  expect_pieces<T>(shape.G, size, [&](int64_t begin, int64_t end, T* out) {
    cpu::sinkhorn_implicit_backward(
        grad.data(), result.plan.data(), out, shape.T, shape.E, 1.0, begin, end, Parallel{});
  });
}

TYPED_TEST(Sinkhorn, GradientsMatchFloat64) {
  using T = TypeParam;
  const Shape shape{2, 9, 4};
  const auto grad = uniform<T>(shape.size(), 14);
  const std::vector<double> exact_grad(grad.begin(), grad.end());
  // Float32 logits iterate on exp(M) in float32, on exp(M) in float64, and on logarithms.
  for (const double spread : {2.0, 50.0, 500.0}) {
    SCOPED_TRACE(::testing::Message() << "spread " << spread);
    const auto wide = uniform<T>(shape.size(), 13, -spread, spread);
    const std::vector<double> exact_wide(wide.begin(), wide.end());
    expect_near(unrolled(shape, grad, wide), unrolled(shape, exact_grad, exact_wide), kRounding<T>);
  }
  const auto logits = uniform<T>(shape.size(), 13);
  const std::vector<double> exact(logits.begin(), logits.end());
  const Options converged{300, 1, 0};
  expect_near(
      unrolled(shape, grad, logits, converged), unrolled(shape, exact_grad, exact, converged),
      kRounding<T>);
  expect_near(
      implicit(shape, grad, sinkhorn(shape, logits, converged).plan),
      implicit(shape, exact_grad, sinkhorn(shape, exact, converged).plan), kRounding<T>);
}

// `steps` is clamped to [0, iterations], so that history is not read out of bounds.
TYPED_TEST(Sinkhorn, BackwardClampsSteps) {
  using T = TypeParam;
  const Shape shape{2, 6, 3};
  const auto grad = uniform<T>(shape.size(), 32);
  for (const double spread : {1.0, 100.0, 1e3}) {
    const auto logits = uniform<T>(shape.size(), 33, -spread, spread);
    const auto forward = sinkhorn(shape, logits, {4, 1, 0});
    const auto with = [&](int32_t a, int32_t b) {
      // Allocated with exactly its size, so that ASan finds reads past its end.
      const std::vector<double> history(forward.history);
      const std::vector<int32_t> steps{a, b};
      std::vector<T> out(shape.size());
      cpu::sinkhorn_backward(
          grad.data(), logits.data(), history.data(), steps.data(), out.data(), shape.T, shape.E,
          int64_t{4}, 1.0, int64_t{0}, shape.G, Parallel{});
      return out;
    };
    EXPECT_EQ(with(4, 9), with(INT32_MAX, 4));
    EXPECT_EQ(with(-1, 0), with(0, INT32_MIN));
  }
}

TEST(SinkhornBackward, IsTheGradientOfTheIterationsDone) {
  for (const Shape& shape : {Shape{2, 5, 3}, {1, 1, 3}, {1, 4, 1}, {1, 3, 6}}) {
    for (const int64_t iterations : {1, 2, 3, 20}) {
      for (const double epsilon : {0.5, 1.0, 2.0}) {
        SCOPED_TRACE(::testing::Message() << "T " << shape.T << " I " << iterations);
        auto logits = uniform<double>(shape.size(), 15);
        if (shape.T == 5) logits[4] = -kInf<double>;
        const auto grad = uniform<double>(shape.size(), 16);
        const Options options{iterations, epsilon, 0};
        expect_gradient(
            unrolled(shape, grad, logits, options), logits, [&](const std::vector<double>& moved) {
              return inner(grad, sinkhorn(shape, moved, options).plan);
            });
      }
    }
  }
}

TEST(SinkhornBackward, DoesNotChangeWithAConstantPerExpert) {
  const Shape shape{1, 6, 3};
  const auto logits = uniform<double>(shape.size(), 28);
  const auto grad = uniform<double>(shape.size(), 29);
  for (const double shift : {150.0, 300.0, 1e4}) {
    auto shifted = logits;
    for (int64_t i = 0; i < shape.size(); i += 3) shifted[i] += shift;
    expect_near(
        unrolled(shape, grad, shifted), unrolled(shape, grad, logits), kRoundingOfLarge<double>);
  }
}

TEST(SinkhornBackward, CountsOnlyTheStepsBeforeTheTolerance) {
  const Shape shape{2, 6, 3};
  const auto logits = uniform<double>(shape.size(), 17);
  const auto grad = uniform<double>(shape.size(), 18);
  const Options options{100, 1, 1e-2};
  const auto result = sinkhorn(shape, logits, options);
  ASSERT_LT(result.steps[0], 100);
  const auto all = unrolled(shape, grad, logits, options);
  for (int64_t g = 0; g < 2; ++g) {
    const auto alone = unrolled<double>(
        {1, 6, 3}, group(grad, g, 18), group(logits, g, 18), {result.steps[g], 1, 0});
    EXPECT_EQ(group(all, g, 18), alone);
  }
}

TEST(SinkhornImplicitBackward, IsTheGradientOfTheFixedPoint) {
  for (const Shape& shape : {Shape{2, 5, 3}, {1, 8, 4}, {1, 1, 3}, {1, 4, 1}, {1, 3, 6}}) {
    for (const double epsilon : {0.5, 1.0, 2.0}) {
      SCOPED_TRACE(::testing::Message() << "T " << shape.T << " epsilon " << epsilon);
      const auto logits = uniform<double>(shape.size(), 19, -1, 1);
      const auto grad = uniform<double>(shape.size(), 20);
      const Options converged{400, epsilon, 0};
      const auto plan = sinkhorn(shape, logits, converged).plan;
      const auto actual = implicit(shape, grad, plan, epsilon);
      expect_gradient(actual, logits, [&](const std::vector<double>& moved) {
        return inner(grad, sinkhorn(shape, moved, converged).plan);
      });
      expect_near(actual, unrolled(shape, grad, logits, converged), 1e-9);
    }
  }
}

TEST(SinkhornImplicitBackward, BlockDiagonalPlan) {
  // Tokens 0 to 3 reach only experts 0 and 1, tokens 4 to 7 only experts 2 and 3. Adding a constant
  // to the potentials of a block changes nothing, so two pivots are 0.
  const Shape shape{1, 8, 4};
  auto logits = uniform<double>(shape.size(), 21, -1, 1);
  for (int64_t i = 0; i < shape.size(); ++i) {
    if ((i / 4 < 4) != (i % 4 < 2)) logits[i] = -kInf<double>;
  }
  const auto grad = uniform<double>(shape.size(), 22);
  const Options converged{400, 1, 0};
  expect_gradient(
      implicit(shape, grad, sinkhorn(shape, logits, converged).plan), logits,
      [&](const std::vector<double>& moved) {
        return inner(grad, sinkhorn(shape, moved, converged).plan);
      });
  // A block-diagonal plan has the gradients of its blocks.
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<double> blocks(shape.size(), 0), wanted(shape.size(), 0);
    for (const int64_t half : {0, 1}) {
      const Shape block{1, 4, 2};
      std::vector<double> part, part_grad;
      for (int64_t i = 0; i < 8; ++i) {
        part_grad.push_back(grad[(half * 4 + i / 2) * 4 + half * 2 + i % 2]);
      }
      part = sinkhorn(block, uniform<double>(8, 2 * seed + half, -5, 5)).plan;
      const auto alone = implicit(block, part_grad, part);
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t at = (half * 4 + i / 2) * 4 + half * 2 + i % 2;
        blocks[at] = part[i];
        wanted[at] = alone[i];
      }
    }
    expect_near(implicit(shape, grad, blocks), wanted, 1e-9);
  }
  // The gradient of a plan of zeros and ones is 0.
  std::vector<double> hard(shape.size(), 0);
  for (int64_t t = 0; t < 8; ++t) hard[t * 4 + t % 4] = 1;
  expect_near(implicit(shape, grad, hard), std::vector<double>(shape.size(), 0), 1e-12);
}

TEST(SinkhornImplicitBackward, RowsAndColumnsOfTheGradientSumToZero) {
  // Adding a constant to the logits of a token or an expert changes no converged plan. So the rows
  // and the columns of the gradient sum to 0, even if the plan has not converged.
  const Shape shape{1, 9, 4};
  const auto plan = sinkhorn(shape, uniform<double>(shape.size(), 23, -5, 5), {2, 1, 0}).plan;
  const auto grad = implicit(shape, uniform<double>(shape.size(), 24), plan);
  for (int64_t t = 0; t < 9; ++t) {
    double sum = 0;
    for (int64_t e = 0; e < 4; ++e) sum += grad[t * 4 + e];
    EXPECT_NEAR(sum, 0, 1e-12);
  }
  for (int64_t e = 0; e < 4; ++e) {
    double sum = 0;
    for (int64_t t = 0; t < 9; ++t) sum += grad[t * 4 + e];
    EXPECT_NEAR(sum, 0, 1e-12);
  }
}

}  // namespace
}  // namespace vmoe
