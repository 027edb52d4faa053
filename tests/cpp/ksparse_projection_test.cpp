#include "ksparse_projection.h"

#include "testing.h"

namespace vmoe {
namespace {

template <typename T>
std::vector<T> project(const std::vector<T>& x, int64_t N, int64_t k) {
  const int64_t n = N > 0 ? static_cast<int64_t>(x.size()) / N : 0;
  Guarded<T> out(N * n);
  cpu::ksparse_projection(x.data(), out.data(), n, k, 0, N);
  EXPECT_TRUE(out.fences_stand());
  return out.values();
}

template <typename T>
double squared_distance(const std::vector<T>& p, const std::vector<T>& x) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double off = static_cast<double>(p[i]) - x[i];
    sum += off * off;
  }
  return sum;
}

// The best projection over all supports of at most k entries. On one support, the projection onto
// the plane sum p = 1 subtracts the same number from every entry. This projection is a candidate if
// no entry becomes negative.
template <typename T>
std::vector<double> best_of_supports(const std::vector<T>& x, int64_t k) {
  const std::vector<double> exact(x.begin(), x.end());
  std::vector<double> best;
  for (uint32_t support = 1; support < 1u << x.size(); ++support) {
    double sum = 0;
    int64_t count = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      if (support >> i & 1) sum += exact[i], ++count;
    }
    if (count > k) continue;
    std::vector<double> p(x.size(), 0);
    bool feasible = true;
    for (size_t i = 0; i < x.size(); ++i) {
      if (!(support >> i & 1)) continue;
      p[i] = exact[i] - (sum - 1) / static_cast<double>(count);
      feasible &= p[i] >= 0;
    }
    if (!feasible) continue;
    if (best.empty() || squared_distance(p, exact) < squared_distance(best, exact)) best = p;
  }
  return best;
}

// Expects non-negative entries with a sum of 1, and at most k non-zeros.
template <typename T>
void expect_feasible(const std::vector<T>& p, int64_t k) {
  double sum = 0;
  int64_t positive = 0;
  for (const T value : p) {
    EXPECT_GE(value, 0);
    sum += value;
    positive += value > 0;
  }
  EXPECT_NEAR(sum, 1, kRounding<T>);
  EXPECT_LE(positive, k);
}

template <typename T>
class KsparseProjection : public ::testing::Test {};
TYPED_TEST_SUITE(KsparseProjection, Floats);

TYPED_TEST(KsparseProjection, IsTheNearestPointOverAllSupports) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 3, 5, 9, 10}) {
    for (int64_t k = 1; k <= n; ++k) {
      for (uint64_t seed = 0; seed < 3; ++seed) {
        for (const double spread : {0.1, 1.0, 10.0}) {
          SCOPED_TRACE(::testing::Message() << "n " << n << " k " << k << " spread " << spread);
          const auto x = uniform<T>(n, seed, -spread, spread);
          const auto p = project(x, 1, k);
          expect_feasible(p, k);
          expect_near(p, best_of_supports(x, k), kRounding<T>);
          // With ties, the distance is unique, but the nearest point is not.
          const auto ties = tied<T>(n, seed);
          const auto q = project(ties, 1, k);
          expect_feasible(q, k);
          const std::vector<double> exact(ties.begin(), ties.end());
          EXPECT_NEAR(
              squared_distance(q, ties), squared_distance(best_of_supports(ties, k), exact),
              4 * kRounding<T>);
        }
      }
    }
  }
}

TYPED_TEST(KsparseProjection, KeepsTheLowerIndexOfATie) {
  using T = TypeParam;
  EXPECT_EQ(project<T>({3, 3, 3, 3}, 1, 2), (std::vector<T>{T{1} / 2, T{1} / 2, 0, 0}));
  EXPECT_EQ(project<T>({0, -T{0}, 0}, 1, 1), (std::vector<T>{1, 0, 0}));
  EXPECT_EQ(project<T>({-T{0}, 0, 0}, 1, 1), (std::vector<T>{1, 0, 0}));
  EXPECT_EQ(project<T>({0, 2, 1, 2, 2}, 1, 2), (std::vector<T>{0, T{1} / 2, 0, T{1} / 2, 0}));
}

TYPED_TEST(KsparseProjection, KOfOneIsTheArgmaxAndKOfNTheSimplexProjection) {
  using T = TypeParam;
  const int64_t n = 300;
  const auto x = uniform<T>(n, 1, -1, 1);
  std::vector<T> hot(n, 0);
  hot[std::max_element(x.begin(), x.end()) - x.begin()] = 1;
  EXPECT_EQ(project(x, 1, 1), hot);
  // The simplex projection by its optimality condition, sum max(x - tau, 0) = 1.
  double low = -2, high = 1;
  for (int i = 0; i < 100; ++i) {
    const double tau = (low + high) / 2;
    double sum = 0;
    for (const T value : x) sum += std::max(value - tau, 0.0);
    (sum > 1 ? low : high) = tau;
  }
  std::vector<double> wanted;
  for (const T value : x) wanted.push_back(std::max(value - low, 0.0));
  expect_near(project(x, 1, n), wanted, kRounding<T>);
}

TYPED_TEST(KsparseProjection, LongRows) {
  using T = TypeParam;
  // The values differ by less than 1 / k, so all k picks stay in the support.
  const int64_t n = 1000, k = 40;
  const auto x = uniform<T>(n, 2, 0, 1e-2);
  const auto p = project(x, 1, k);
  expect_feasible(p, k);
  std::vector<T> sorted = x;
  std::sort(sorted.begin(), sorted.end(), std::greater<T>());
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += sorted[i];
  const double tau = (sum - 1) / k;
  for (int64_t i = 0; i < n; ++i) {
    EXPECT_NEAR(p[i], x[i] >= sorted[k - 1] ? x[i] - tau : 0, kRounding<T>);
  }
}

TYPED_TEST(KsparseProjection, ShiftOfARowChangesNothing) {
  using T = TypeParam;
  const int64_t n = 12;
  std::vector<T> x = tied<T>(n, 3, 9), high = x, low = x;
  for (int64_t i = 0; i < n; ++i) high[i] += 8192, low[i] -= 8192;  // exact: x is in halves
  for (const int64_t k : {1, 3, 9, 12}) {
    expect_near(project(high, 1, k), project(x, 1, k), kRounding<T>);
    expect_near(project(low, 1, k), project(x, 1, k), kRounding<T>);
  }
}

TYPED_TEST(KsparseProjection, ExtremeValues) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const std::vector<T> first{1, 0, 0}, halves{T{1} / 2, T{1} / 2, 0};
  for (const int64_t k : {2, 3}) {
    EXPECT_EQ(project<T>({T{1e4}, -T{1e4}, 0}, 1, k), first);
    EXPECT_EQ(project<T>({-T{1e4}, -T{3e4}, -T{2e4}}, 1, k), first);
    EXPECT_EQ(project<T>({Limits::max(), 0, Limits::lowest()}, 1, k), first);
    EXPECT_EQ(project<T>({Limits::lowest() / 2, Limits::lowest(), -kInf<T>}, 1, k), first);
    EXPECT_EQ(project<T>({Limits::max(), Limits::max(), 0}, 1, k), halves);
    EXPECT_EQ(project<T>({T{1e30}, T{1e30}, -T{1e30}}, 1, k), halves);
  }
  EXPECT_EQ(project<T>({Limits::denorm_min(), 0, -T{0}}, 1, 2), halves);
}

TYPED_TEST(KsparseProjection, MinusInfinityNeverGetsMass) {
  using T = TypeParam;
  EXPECT_EQ(
      project<T>({-kInf<T>, 1, -kInf<T>, 1}, 1, 4), (std::vector<T>{0, T{1} / 2, 0, T{1} / 2}));
  EXPECT_EQ(project<T>({-kInf<T>, -T{1e4}, -kInf<T>}, 1, 3), (std::vector<T>{0, 1, 0}));
}

TYPED_TEST(KsparseProjection, RowWithoutAProjectionIsNaN) {
  using T = TypeParam;
  const T inf = kInf<T>, nan = kNaN<T>;
  const std::vector<std::vector<T>> bad{{nan, 0, 1},      {0, nan, 1},     {inf, 0, 1},
                                        {inf, inf, 0},    {inf, inf, inf}, {inf, -inf, 0},
                                        {nan, inf, -inf}, {nan, nan, nan}, {-inf, -inf, -inf}};
  for (const int64_t k : {1, 2, 3}) {
    for (const auto& row : bad) {
      // The rows before and after a row without a projection must not change.
      std::vector<T> x{0, 5, 0};
      x.insert(x.end(), row.begin(), row.end());
      x.insert(x.end(), {0, 0, 5});
      const auto p = project(x, 3, k);
      EXPECT_EQ(group(p, 0, 3), (std::vector<T>{0, 1, 0}));
      EXPECT_TRUE(all_nan(group(p, 1, 3))) << row[0] << " " << row[1] << " " << row[2];
      EXPECT_EQ(group(p, 2, 3), (std::vector<T>{0, 0, 1}));
    }
  }
}

TYPED_TEST(KsparseProjection, EmptyShapes) {
  using T = TypeParam;
  EXPECT_TRUE(project<T>({}, 0, 2).empty());
  EXPECT_TRUE(project<T>({}, 3, 0).empty());                          // rows of length 0
  EXPECT_EQ(project<T>({1, 2, 3}, 1, 0), (std::vector<T>{0, 0, 0}));  // no non-zero allowed
}

// The gradient by its definition, in float64. Column (a, b) is [a, :, b].
template <typename T>
std::vector<double> centred(
    const std::vector<T>& grad, const std::vector<T>& out, int64_t A, int64_t n, int64_t B) {
  std::vector<double> wanted(A * n * B, 0);
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t b = 0; b < B; ++b) {
      double total = 0, count = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (a * n + i) * B + b;
        if (out[at] != 0) total += grad[at], count += 1;
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (a * n + i) * B + b;
        if (out[at] != 0) wanted[at] = grad[at] - total / count;
      }
    }
  }
  return wanted;
}

TYPED_TEST(KsparseProjection, BackwardIsCentredOnTheSupport) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 15, 16, 17, 40, 300}) {
    for (const int64_t B : {1, 2, 8, 15, 16, 17, 33}) {
      SCOPED_TRACE(::testing::Message() << "n " << n << " B " << B);
      const int64_t A = 2;
      const auto grad = uniform<T>(A * n * B, n, -1, 1);
      auto out = tied<T>(A * n * B, B);
      for (int64_t i = 0; i < n; ++i) out[i * B] = 0;  // an empty support
      Guarded<T> grad_x(A * n * B);
      cpu::ksparse_projection_backward(grad.data(), out.data(), grad_x.data(), n, B, 0, A);
      EXPECT_TRUE(grad_x.fences_stand());
      expect_near(grad_x.values(), centred(grad, out, A, n, B), 4 * kRounding<T>);
      expect_pieces<T>(A, n * B, [&](int64_t begin, int64_t end, T* piece) {
        cpu::ksparse_projection_backward(grad.data(), out.data(), piece, n, B, begin, end);
      });
    }
  }
}

TYPED_TEST(KsparseProjection, BackwardIgnoresEntriesOutsideTheSupport) {
  using T = TypeParam;
  const std::vector<T> out{T{1} / 2, 0, T{1} / 2, 0}, grad{1, kNaN<T>, 3, kInf<T>};
  std::vector<T> grad_x(4);
  cpu::ksparse_projection_backward(grad.data(), out.data(), grad_x.data(), 4, 1, 0, 1);
  EXPECT_EQ(grad_x, (std::vector<T>{-1, 0, 1, 0}));
  const std::vector<T> undefined(4, kNaN<T>);  // NaN entries are in the support
  cpu::ksparse_projection_backward(out.data(), undefined.data(), grad_x.data(), 4, 1, 0, 1);
  EXPECT_EQ(grad_x, (std::vector<T>{T{1} / 4, -T{1} / 4, T{1} / 4, -T{1} / 4}));
}

TYPED_TEST(KsparseProjection, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const int64_t N = 7, n = 12;
  const auto x = tied<T>(N * n, 4, 5);
  for (const int64_t k : {2, 10}) {
    expect_pieces<T>(N, n, [&](int64_t begin, int64_t end, T* out) {
      cpu::ksparse_projection(x.data(), out, n, k, begin, end);
    });
  }
}

}  // namespace
}  // namespace vmoe
