#include "simd_probe.h"
#include "testing.h"

namespace vmoe {
namespace {

template <typename T>
class Simd : public ::testing::Test {
 public:
  static int64_t width() {
    int64_t bytes = 0;
    cpu::vector_bytes(&bytes);
    return bytes / static_cast<int64_t>(sizeof(T));
  }

  static std::vector<T> exp(const std::vector<T>& x) {
    Guarded<T> out(x.size());
    cpu::exp_each(x.data(), out.data(), static_cast<int64_t>(x.size()));
    EXPECT_TRUE(out.fences_stand());
    return out.values();
  }

  // The smallest and the largest argument for which exp is a normal number.
  static constexpr T kLowest = sizeof(T) == 4 ? -87.336 : -708.396;
  static constexpr T kHighest = sizeof(T) == 4 ? 88.722 : 709.782;
  static constexpr double kError = sizeof(T) == 4 ? 2e-7 : 5e-16;
};
TYPED_TEST_SUITE(Simd, Floats);

TYPED_TEST(Simd, ExpKeepsItsErrorBound) {
  using T = TypeParam;
  std::vector<T> x;
  for (const double reach : {1.0, 1e-3, 1e-9, 0.02}) {
    const auto some = uniform<T>(50'000, x.size(), reach * this->kLowest, reach * this->kHighest);
    x.insert(x.end(), some.begin(), some.end());
  }
  x.push_back(this->kLowest);
  x.push_back(this->kHighest);
  const auto y = this->exp(x);
  long double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double wanted = std::exp(static_cast<long double>(x[i]));
    worst = std::max(worst, std::abs(y[i] - wanted) / wanted);
  }
  EXPECT_LE(worst, this->kError);
}

TYPED_TEST(Simd, ExpOfSpecialValues) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const auto y = this->exp(
      {0, -T{0}, Limits::denorm_min(), -Limits::denorm_min(), kInf<T>, Limits::max(), T{1e4},
       -kInf<T>, Limits::lowest(), T{-1e4}, kNaN<T>, -kNaN<T>});
  const std::vector<T> wanted{1, 1, 1, 1, kInf<T>, kInf<T>, kInf<T>, 0, 0, 0};
  EXPECT_EQ(std::vector<T>(y.begin(), y.begin() + 10), wanted);
  EXPECT_TRUE(std::isnan(y[10]) && std::isnan(y[11]));
}

TYPED_TEST(Simd, ExpOfNegativesIsExp) {
  using T = TypeParam;
  auto x = uniform<T>(50'000, 8, this->kLowest, 0);
  const auto small = uniform<T>(1000, 9, -1e-3, 0);
  x.insert(x.end(), small.begin(), small.end());
  std::vector<T> y(x.size());
  cpu::exp_negative_each(static_cast<const T*>(x.data()), y.data(), static_cast<int64_t>(x.size()));
  const auto wanted = this->exp(x);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_LE(std::abs(y[i] - wanted[i]), 2 * this->kError * wanted[i]) << x[i];
  }
  const std::vector<T> special{0, -T{0}, -kInf<T>, std::numeric_limits<T>::lowest(), kNaN<T>};
  y.resize(special.size());
  cpu::exp_negative_each(special.data(), y.data(), static_cast<int64_t>(special.size()));
  EXPECT_EQ((std::vector<T>{y.begin(), y.begin() + 4}), (std::vector<T>{1, 1, 0, 0}));
  EXPECT_TRUE(std::isnan(y[4]));
}

TYPED_TEST(Simd, ExpIsTheSameInEveryLane) {
  using T = TypeParam;
  for (const T value : uniform<T>(64, 3, this->kLowest, this->kHighest)) {
    const auto y = this->exp(std::vector<T>(2 * this->width() + 3, value));
    EXPECT_EQ(y, std::vector<T>(y.size(), y[0]));
  }
}

TEST(SimdOfOneType, LogKeepsItsErrorBound) {
  // Values near 1, whose logarithm is small; values in all binades; the smallest and the largest
  // normal number.
  std::vector<double> x = uniform<double>(40'000, 5, 0.5, 2);
  for (const double exponent : uniform<double>(23'996, 6, -1022, 1023)) {
    x.push_back(std::exp2(exponent));
  }
  using Limits = std::numeric_limits<double>;
  for (const double value : {Limits::min(), Limits::max(), 1.0, 1.0 + Limits::epsilon()}) {
    x.push_back(value);
  }
  std::vector<double> y(x.size());
  cpu::log_each(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const long double wanted = std::log(static_cast<long double>(x[i]));
    ASSERT_LE(std::abs(y[i] - wanted), 3e-16L * std::abs(wanted)) << x[i];
  }
}

TEST(SimdOfOneType, SqrtIsCorrectlyRounded) {
  std::vector<double> x = uniform<double>(1000, 9, 0, 1e6);
  using Limits = std::numeric_limits<double>;
  for (const double value :
       {0.0, 1.0, 2.0, Limits::denorm_min(), Limits::min(), Limits::max(), kInf<double>, -1.0}) {
    x.push_back(value);
  }
  std::vector<double> y(x.size());
  cpu::sqrt_each(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i + 1 < x.size(); ++i) ASSERT_EQ(y[i], std::sqrt(x[i])) << x[i];
  EXPECT_TRUE(std::isnan(y.back()));
}

TEST(SimdOfOneType, ProductErrorIsExact) {
  const auto a = uniform<float>(4096, 7, -100, 100), b = uniform<float>(4096, 8, -1, 1);
  std::vector<float> error(a.size());
  cpu::product_error_each(a.data(), b.data(), error.data(), static_cast<int64_t>(a.size()));
  int64_t rounded = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float product = a[i] * b[i];
    ASSERT_EQ(double{product} + error[i], double{a[i]} * b[i]) << a[i] << " * " << b[i];
    rounded += error[i] != 0;
  }
  EXPECT_GT(rounded, 2048);
}

TYPED_TEST(Simd, TransposesABlock) {
  using T = TypeParam;
  const int64_t W = this->width();
  std::vector<T> x(W * W), y(W * W);
  for (int64_t i = 0; i < W * W; ++i) x[i] = static_cast<T>(i);
  cpu::transpose_block(static_cast<const T*>(x.data()), y.data());
  for (int64_t r = 0; r < W; ++r) {
    for (int64_t c = 0; c < W; ++c) EXPECT_EQ(y[r * W + c], x[c * W + r]);
  }
}

TYPED_TEST(Simd, CompressesInOrder) {
  using T = TypeParam;
  const int64_t W = this->width();
  const auto x = uniform<T>(W, 5);
  for (uint32_t bits = 0; bits < 1u << W; bits += W > 8 ? 7 : 1) {
    std::vector<int32_t> chosen(W), wanted_places;
    std::vector<T> wanted;
    for (int64_t i = 0; i < W; ++i) {
      chosen[i] = bits >> i & 1;
      if (!chosen[i]) continue;
      wanted.push_back(x[i]);
      wanted_places.push_back(static_cast<int32_t>(100 + i));
    }
    Guarded<T> entries(W);
    Guarded<int32_t> places(W);
    uint32_t seen = 0;
    cpu::compress_vector(
        x.data(), static_cast<const int32_t*>(chosen.data()), 100, entries.data(), places.data(),
        &seen);
    EXPECT_EQ(seen, bits);
    EXPECT_TRUE(entries.fences_stand() && places.fences_stand());
    EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), entries.data()));
    EXPECT_TRUE(std::equal(wanted_places.begin(), wanted_places.end(), places.data()));
  }
}

TYPED_TEST(Simd, CopiesTheFirstEntries) {
  using T = TypeParam;
  const int64_t W = this->width();
  for (int64_t count = 1; count < W; ++count) {
    // Allocated with exactly its size, so that a sanitizer finds a load past its end.
    const auto x = uniform<T>(count, 6);
    Guarded<T> all(W), out(count);
    cpu::copy_some(x.data(), count, T{7}, all.data(), out.data());
    EXPECT_TRUE(out.fences_stand());
    EXPECT_EQ(out.values(), x);
    auto wanted = x;
    wanted.resize(W, T{7});
    EXPECT_EQ(all.values(), wanted);
  }
}

TYPED_TEST(Simd, SumsAVector) {
  using T = TypeParam;
  std::vector<T> x(this->width());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(1 << i);
  T total = 0;
  cpu::sum_vector(static_cast<const T*>(x.data()), &total);
  EXPECT_EQ(total, static_cast<T>((1 << x.size()) - 1));
}

}  // namespace
}  // namespace vmoe
