#include "grouped_mlp.h"

#include <numbers>
#include <tuple>

#include "cpu/filled_rows.h"
#include "testing.h"

namespace vmoe {
namespace {

struct Point {
  double value, slope;
};

Point gelu(double x_, bool tanh) {
  const long double x = x_, pi = std::numbers::pi_v<long double>;
  long double value, slope;
  if (tanh) {
    const long double inner = 2 * sqrtl(2 / pi) * (x + 0.044715L * x * x * x);
    const long double gate = 1 / (1 + expl(-inner));
    value = x * gate;
    slope = gate + x * gate * (1 - gate) * 2 * sqrtl(2 / pi) * (1 + 3 * 0.044715L * x * x);
  } else {
    const long double below = erfcl(-x / sqrtl(2)) / 2;
    value = x * below;
    slope = below + x * expl(-x * x / 2) / sqrtl(2 * pi);
  }
  return {static_cast<double>(value), static_cast<double>(slope)};
}

template <typename T>
std::vector<T> hard_values() {
  const T huge = std::numeric_limits<T>::max() / 4;  // its square is infinity
  std::vector<T> x = {0, T(-0.0), 1, -1, T(1e-30), T(-1e-6), 40, -40, 1000, -1000, huge, -huge};
  for (int i = -2000; i <= 2000; ++i) x.push_back(T(i) * T(0.00611));
  return x;
}

template <typename T>
class GroupedMlp : public ::testing::Test {
 protected:
  // The error bound that the contract states.
  static constexpr double kError = sizeof(T) == 4 ? 1e-6 : 1e-14;

  // Calls body(rows, columns, tanh) with numbers of columns that give whole vectors, remainders, or
  // both.
  template <typename Body>
  static void each_shape(Body&& body) {
    for (int64_t columns : {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 50}) {
      for (const bool tanh : {false, true}) body(int64_t{3}, columns, tanh);
    }
  }
};
TYPED_TEST_SUITE(GroupedMlp, Floats);

TYPED_TEST(GroupedMlp, GeluIsWithinItsBound) {
  const std::vector<TypeParam> x = hard_values<TypeParam>();
  const int64_t n = x.size();
  for (const bool tanh : {false, true}) {
    std::vector<TypeParam> forward(n), out(n), grad(n, 1);
    cpu::bias_gelu(x.data(), (const TypeParam*)nullptr, forward.data(), 1, n, n, tanh);
    cpu::bias_gelu_backward(
        x.data(), (const TypeParam*)nullptr, out.data(), grad.data(), (TypeParam*)nullptr, 1, n, n,
        tanh);
    for (int64_t i = 0; i < n; ++i) {
      const Point wanted = gelu(x[i], tanh);
      const double bound = this->kError * std::max(1.0, std::abs(double(x[i])));
      EXPECT_NEAR(forward[i], wanted.value, bound) << x[i];
      EXPECT_NEAR(grad[i], wanted.slope, bound) << x[i];
      EXPECT_EQ(out[i], forward[i]) << x[i];
    }
  }
}

TYPED_TEST(GroupedMlp, GeluOfInfinityAndNaN) {
  std::vector<TypeParam> x = {kInf<TypeParam>, kNaN<TypeParam>, 1}, out(3);
  for (const bool tanh : {false, true}) {
    cpu::bias_gelu(x.data(), (const TypeParam*)nullptr, out.data(), 1, 3, 3, tanh);
    EXPECT_EQ(out[0], kInf<TypeParam>);
    EXPECT_TRUE(std::isnan(out[1]));
    EXPECT_NEAR(out[2], gelu(1, tanh).value, this->kError);
  }
}

TYPED_TEST(GroupedMlp, GeluAddsTheBiasAndWritesOnlyItsRows) {
  using T = TypeParam;
  this->each_shape([&](int64_t rows, int64_t columns, bool tanh) {
    const int64_t stride = columns + 3;
    const std::vector<T> x = uniform<T>(rows * stride, 1), bias = uniform<T>(columns, 2);
    Guarded<T> out(rows * columns);
    cpu::bias_gelu(x.data(), bias.data(), out.data(), rows, columns, stride, tanh);
    EXPECT_TRUE(out.fences_stand());
    std::vector<double> wanted;
    for (int64_t i = 0; i < rows * columns; ++i) {
      const T sum = x[i / columns * stride + i % columns] + bias[i % columns];
      wanted.push_back(gelu(sum, tanh).value);
    }
    expect_near(out.values(), wanted, 4 * this->kError);
  });
}

TYPED_TEST(GroupedMlp, GradientOfGelu) {
  using T = TypeParam;
  this->each_shape([&](int64_t rows, int64_t columns, bool tanh) {
    const int64_t stride = columns + 3;
    const std::vector<T> x = uniform<T>(rows * stride, 1), bias = uniform<T>(columns, 2);
    const std::vector<T> grad = uniform<T>(rows * columns, 3), before = uniform<T>(columns, 4);
    Guarded<T> out(rows * columns), grad_x(rows * columns), grad_bias(columns);
    std::copy(grad.begin(), grad.end(), grad_x.data());
    std::copy(before.begin(), before.end(), grad_bias.data());
    cpu::bias_gelu_backward(
        x.data(), bias.data(), out.data(), grad_x.data(), grad_bias.data(), rows, columns, stride,
        tanh);
    EXPECT_TRUE(out.fences_stand() && grad_x.fences_stand() && grad_bias.fences_stand());
    std::vector<double> value, slope, sum(before.begin(), before.end());
    for (int64_t i = 0; i < rows * columns; ++i) {
      const Point at = gelu(T(x[i / columns * stride + i % columns] + bias[i % columns]), tanh);
      value.push_back(at.value);
      slope.push_back(grad[i] * at.slope);
      sum[i % columns] += slope.back();
    }
    expect_near(out.values(), value, 4 * this->kError);
    expect_near(grad_x.values(), slope, 8 * this->kError);
    expect_near(grad_bias.values(), sum, 32 * this->kError);
  });
}

TYPED_TEST(GroupedMlp, EqualValuesGetEqualBits) {
  using T = TypeParam;
  const std::vector<T> x(77, T(0.7316));
  for (const bool tanh : {false, true}) {
    std::vector<T> out(77), grad(77, T(1.25)), in_place = x;
    cpu::bias_gelu_backward(
        x.data(), (const T*)nullptr, out.data(), grad.data(), (T*)nullptr, 1, 77, 77, tanh);
    cpu::bias_gelu(in_place.data(), (const T*)nullptr, in_place.data(), 7, 11, 11, tanh);
    EXPECT_EQ(out, std::vector<T>(77, out[0]));
    EXPECT_EQ(grad, std::vector<T>(77, grad[0]));
    EXPECT_EQ(in_place, out);
  }
}

TYPED_TEST(GroupedMlp, AddsBiasesAndRows) {
  using T = TypeParam;
  this->each_shape([&](int64_t rows, int64_t columns, bool) {
    const std::vector<T> x = tied<T>(rows * columns, 1), bias = tied<T>(columns, 2);
    Guarded<T> out(rows * columns), copy(rows * columns), sum(columns);
    cpu::add_bias(x.data(), bias.data(), out.data(), rows, columns);
    cpu::add_bias(x.data(), (const T*)nullptr, copy.data(), rows, columns);
    std::copy(bias.begin(), bias.end(), sum.data());
    cpu::add_rows(x.data(), sum.data(), rows, columns);
    EXPECT_TRUE(out.fences_stand() && copy.fences_stand() && sum.fences_stand());
    std::vector<T> wanted_out, wanted_sum = bias;
    for (int64_t i = 0; i < rows * columns; ++i) {
      wanted_out.push_back(x[i] + bias[i % columns]);
      wanted_sum[i % columns] += x[i];
    }
    EXPECT_EQ(out.values(), wanted_out);
    EXPECT_EQ(copy.values(), x);
    EXPECT_EQ(sum.values(), wanted_sum);
  });
}

using Piece = std::tuple<int64_t, int64_t, int64_t>;

std::vector<Piece> runs(const FilledRows& rows, int64_t expert, int64_t begin, int64_t end) {
  std::vector<Piece> found;
  rows.each_run(expert, begin, end, [&](int64_t row, int64_t at, int64_t count) {
    found.push_back({row, at, count});
  });
  return found;
}

TEST(FilledRows, NumbersTheFilledRowsOfEverySegment) {
  const std::vector<int32_t> filled = {3, 0, 5, 2, /**/ 0, 0, 0, 0, /**/ 5, 5, -1, 9};
  const FilledRows rows(filled.data(), 3, 4, 5);
  EXPECT_EQ(rows.count(0), 10);
  EXPECT_EQ(rows.count(1), 0);
  EXPECT_EQ(rows.count(2), 15);  // clamped to [0, 5]
  EXPECT_EQ(runs(rows, 0, 0, 10), (std::vector<Piece>{{0, 0, 3}, {10, 3, 5}, {15, 8, 2}}));
  EXPECT_EQ(runs(rows, 0, 2, 5), (std::vector<Piece>{{2, 2, 1}, {10, 3, 2}}));
  EXPECT_EQ(runs(rows, 0, 3, 4), (std::vector<Piece>{{10, 3, 1}}));
  EXPECT_TRUE(runs(rows, 1, 0, 0).empty());
  EXPECT_EQ(rows.joined(0, 0, 3), 0);
  EXPECT_EQ(rows.joined(0, 0, 4), -1);
  EXPECT_EQ(rows.joined(0, 3, 10), 10);
  EXPECT_EQ(rows.joined(2, 1, 10), 1);
  EXPECT_EQ(rows.joined(2, 9, 11), -1);
}

TEST(FilledRows, FindsTheGaps) {
  const std::vector<int32_t> filled = {3, 0, 5};
  std::vector<std::pair<int64_t, int64_t>> gaps;
  FilledRows(filled.data(), 1, 3, 5).each_gap(0, [&](int64_t row, int64_t count) {
    gaps.push_back({row, count});
  });
  EXPECT_EQ(gaps, (std::vector<std::pair<int64_t, int64_t>>{{3, 2}, {5, 5}}));
}

TEST(FilledRows, WithoutCountsAllRowsAreFilled) {
  const FilledRows rows(nullptr, 2, 3, 4);
  EXPECT_EQ(rows.count(1), 12);
  EXPECT_EQ(runs(rows, 1, 2, 11), (std::vector<Piece>{{2, 2, 9}}));
  rows.each_gap(0, [](int64_t, int64_t) { FAIL(); });
}

}  // namespace
}  // namespace vmoe
