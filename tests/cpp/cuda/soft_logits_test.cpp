#include "soft_logits.h"

#include "common/row_stride.h"
#include "device.h"

namespace vmoe {
namespace {

template <typename Row>
class CudaSoftLogits : public ::testing::Test {
 public:
  using T = Compute<Row>;

  static void expect_as_on_cpu(
      const std::vector<Row>& x, int64_t rows, int64_t D, int64_t S, const std::vector<Row>& grad) {
    SCOPED_TRACE(::testing::Message() << rows << " x " << D << ", S " << S);
    const auto wide_x = values_of(x);
    auto products = uniform<T>(rows * S, S);
    std::vector<T> scaled(rows * S);
    cpu::soft_logits(
        wide_x.data(), static_cast<const T*>(products.data()), scaled.data(), D, S, 0, rows);
    DeviceArray<Row> device_x(x);

    const int64_t stride = row_stride<Row>(S);
    DeviceArray<T> whole(products), logits(rows * S);
    DeviceArray<Row> device_scaled(rows * stride);
    cuda::soft_logits_scaled(
        device_x.data(), whole.data(), device_scaled.data(), D, S, rows, nullptr);
    std::vector<Row> without_ends;
    const auto with_ends = device_scaled.values();
    for (int64_t row = 0; row < rows; ++row) {
      const auto begin = with_ends.begin() + row * stride;
      without_ends.insert(without_ends.end(), begin, begin + S);
    }
    expect_rounded(without_ends, scaled);

    if constexpr (kHalf<Row>) {
      std::vector<T> parts(rows * 2 * stride, kNaN<T>);  // padding must not affect the result
      const auto low = uniform<T>(rows * S, S + 1, -0.01, 0.01);
      for (int64_t i = 0; i < rows * S; ++i) {
        T* row = parts.data() + i / S * 2 * stride;
        row[i % S] = products[i] - low[i];
        row[stride + i % S] = low[i];
      }
      DeviceArray<T> device_parts(parts);
      cuda::soft_logits(device_x.data(), device_parts.data(), logits.data(), D, S, rows, nullptr);
    } else {
      cuda::soft_logits(device_x.data(), whole.data(), logits.data(), D, S, rows, nullptr);
      cuda::soft_logits(device_x.data(), whole.data(), whole.data(), D, S, rows, nullptr);
      expect_same(whole.values(), logits.values());
    }
    expect_near(logits.values(), scaled, kRounding<T>);

    auto wide_grad = values_of(grad);
    cpu::soft_logits_backward(wide_x.data(), wide_grad.data(), D, 0, rows);
    DeviceArray<Row> device_grad(grad);
    cuda::soft_logits_backward(device_x.data(), device_grad.data(), D, rows, nullptr);
    expect_rounded(device_grad.values(), wide_grad);
  }
  static void expect_as_on_cpu(const std::vector<Row>& x, int64_t count, int64_t D, int64_t S) {
    expect_as_on_cpu(x, count, D, S, rows<Row>(count * D, 3));
  }
};
TYPED_TEST_SUITE(CudaSoftLogits, Rows);

// Rows are loaded in pieces of 16 bytes or entry by entry, depending on D and S.
TYPED_TEST(CudaSoftLogits, MatchesTheCpu) {
  for (const int64_t D : {1, 5, 8, 31, 128, 192, 769}) {
    for (const int64_t S : {0, 1, 4, 37, 40, 196}) {
      auto x = rows<TypeParam>(11 * D, D);
      for (int64_t d = 0; d < D; ++d) set(x[d], 0);
      this->expect_as_on_cpu(x, 11, D, S);
    }
  }
}

TYPED_TEST(CudaSoftLogits, ExtremeValues) {
  using Row = TypeParam;
  const std::vector<Row> no_grad(2 * 8, Row{});
  const bool small = std::is_same_v<Row, Float16>;
  for (const float value : {small ? 6e4f : 1e30f, small ? 1e-4f : 1e-30f}) {
    std::vector<Row> x(2 * 8);
    for (Row& entry : x) set(entry, value);
    this->expect_as_on_cpu(x, 2, 8, 3, no_grad);
  }
  for (const float value : {kInf<float>, kNaN<float>}) {
    std::vector<Row> x(2 * 8);
    for (Row& entry : x) {
      set(entry, value);
      if constexpr (std::is_same_v<Row, Float16>) entry.bits = value > 0 ? 0x7C00 : 0x7E00;
    }
    this->expect_as_on_cpu(x, 2, 8, 3, no_grad);
  }
}

TYPED_TEST(CudaSoftLogits, EmptyShapes) {
  this->expect_as_on_cpu({}, 0, 3, 4);
  this->expect_as_on_cpu({}, 2, 0, 4);
  this->expect_as_on_cpu(rows<TypeParam>(2, 1), 2, 1, 0);
}

template <typename Row>
class CudaSoftLogitsParts : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSoftLogitsParts, Halves);

TYPED_TEST(CudaSoftLogitsParts, AddUpToPhi) {
  using Row = TypeParam;
  for (const int64_t S : {1, 4, 7, 8, 37, 196}) {
    const int64_t D = 5, stride = row_stride<Row>(S);
    auto phi = uniform<float>(D * S, S);
    phi[0] = kInf<float>;
    phi[S] = kNaN<float>;
    phi[2 * S] = -kInf<float>;
    phi[3 * S] = 0;
    DeviceArray<float> device_phi(phi);
    DeviceArray<Row> device_parts(D * 2 * stride);
    cuda::soft_logits_parts(device_phi.data(), device_parts.data(), D, S, nullptr);
    const auto parts = values_of(device_parts.values());
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t s = 0; s < stride; ++s) {
        const double high = parts[d * 2 * stride + s], low = parts[(d * 2 + 1) * stride + s];
        const float wanted = s < S ? phi[d * S + s] : 0;
        if (std::isfinite(wanted)) {
          EXPECT_NEAR(high, wanted, kUnit<Row> * std::abs(wanted) + 0x1p-25);
          EXPECT_NEAR(high + low, wanted, kUnit<Row> * kUnit<Row> * std::abs(wanted) + 0x1p-25);
        } else {
          EXPECT_TRUE(high == wanted || std::isnan(wanted) == std::isnan(high));
          EXPECT_EQ(low, 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vmoe
