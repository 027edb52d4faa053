#include "soft_logits.h"

#include "testing.h"

namespace vmoe {
namespace {

template <typename T>
std::vector<T> soft_logits(
    const std::vector<T>& x, const std::vector<T>& products, int64_t rows, int64_t D, int64_t S) {
  Guarded<T> out(rows * S);
  cpu::soft_logits(x.data(), products.data(), out.data(), D, S, int64_t{0}, rows);
  EXPECT_TRUE(out.fences_stand());
  return out.values();
}

template <typename T>
class SoftLogits : public ::testing::TestWithParam<bool> {};
TYPED_TEST_SUITE(SoftLogits, Floats);

TYPED_TEST(SoftLogits, DividesByTheNormOfTheToken) {
  using T = TypeParam;
  for (const int64_t D : {1, 5, 15, 16, 17, 33, 192}) {
    for (const int64_t S : {1, 4, 37}) {
      const int64_t rows = 6;
      auto x = uniform<T>(rows * D, D);
      for (int64_t d = 0; d < D; ++d) x[d] = 0;
      const auto products = uniform<T>(rows * S, S);
      std::vector<double> wanted;
      for (int64_t row = 0; row < rows; ++row) {
        long double square = 1e-6L;
        for (int64_t d = 0; d < D; ++d) square += std::pow((long double)x[row * D + d], 2);
        for (int64_t s = 0; s < S; ++s) {
          wanted.push_back((double)(products[row * S + s] / std::sqrt(square)));
        }
      }
      SCOPED_TRACE(::testing::Message() << "D " << D << " S " << S);
      expect_near(soft_logits(x, products, rows, D, S), wanted, kRounding<T>);
    }
  }
}

TYPED_TEST(SoftLogits, EmptyShapes) {
  using T = TypeParam;
  EXPECT_TRUE(soft_logits<T>({}, {}, 0, 3, 4).empty());
  EXPECT_TRUE(soft_logits<T>({1, 2}, {}, 2, 1, 0).empty());
  expect_near(soft_logits<T>({}, {1, 2}, 2, 0, 1), std::vector<double>{1e3, 2e3}, kRounding<T>);
}

TEST(SoftLogits, TokensOfAnyNorm) {
  for (const float length : {1e30f, 1e-30f}) {
    const std::vector<float> x(8, length);
    const double wanted = length > 1 ? std::sqrt(1 / 8.0) : 1e-27;
    EXPECT_NEAR(soft_logits<float>(x, {length}, 1, 8, 1)[0] / wanted, 1, 1e-5);
  }
}

TYPED_TEST(SoftLogits, NonFiniteTokensGiveNaN) {
  using T = TypeParam;
  for (const T bad : {kNaN<T>, kInf<T>, -kInf<T>}) {
    const std::vector<T> x{1, bad, 2, 1, 1, 1};
    const auto out = soft_logits<T>(x, {bad, bad, 1, 1}, 2, 3, 2);
    EXPECT_TRUE(std::isnan(out[0]) && std::isnan(out[1]));
    EXPECT_TRUE(std::isfinite(out[2]) && std::isfinite(out[3]));
  }
}

TYPED_TEST(SoftLogits, InPlaceAndInPieces) {
  using T = TypeParam;
  const int64_t rows = 7, D = 19, S = 21;
  const auto x = uniform<T>(rows * D, 1), products = uniform<T>(rows * S, 2);
  const auto whole = soft_logits(x, products, rows, D, S);
  auto in_place = products;
  cpu::soft_logits(x.data(), in_place.data(), in_place.data(), D, S, int64_t{0}, rows);
  EXPECT_EQ(in_place, whole);
  expect_pieces<T>(rows, S, [&](int64_t begin, int64_t end, T* out) {
    cpu::soft_logits(x.data(), products.data(), out, D, S, begin, end);
  });
  // Computed in place: elements outside the piece must keep their values.
  const auto grad = uniform<T>(rows * D, 3);
  auto all = grad, piece = grad;
  cpu::soft_logits_backward(x.data(), all.data(), D, int64_t{0}, rows);
  cpu::soft_logits_backward(x.data(), piece.data(), D, int64_t{2}, int64_t{5});
  for (int64_t i = 0; i < rows * D; ++i) {
    EXPECT_EQ(piece[i], i / D >= 2 && i / D < 5 ? all[i] : grad[i]);
  }
}

TEST(SoftLogitsBackward, IsTheGradient) {
  const int64_t rows = 4, D = 18, S = 3;
  auto x = uniform<double>(rows * D, 1, -1, 1);
  for (int64_t d = 0; d < D; ++d) x[d] = 0;
  const auto phi = uniform<double>(D * S, 2), weight = uniform<double>(rows * S, 3);
  // The sum of weight * r <x, phi>.
  const auto loss = [&](const std::vector<double>& tokens) {
    std::vector<double> products(rows * S);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t s = 0; s < S; ++s) {
          products[row * S + s] += tokens[row * D + d] * phi[d * S + s];
        }
      }
    }
    return inner(weight, soft_logits(tokens, products, rows, D, S));
  };
  const auto scaled = soft_logits(x, weight, rows, D, S);
  std::vector<double> grad(rows * D);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t s = 0; s < S; ++s) grad[row * D + d] += scaled[row * S + s] * phi[d * S + s];
    }
  }
  cpu::soft_logits_backward(x.data(), grad.data(), D, int64_t{0}, rows);
  // The second derivative at the zero token is about 1e6, so the step must be small.
  expect_gradient(grad, x, loss, 1e-5, 1e-7);
}

}  // namespace
}  // namespace vmoe
