#include "soft_logits.h"

#include "device.h"

namespace vmoe {
namespace {

template <typename T>
class CudaSoftLogits : public ::testing::Test {
 public:
  static void expect_as_on_cpu(
      const std::vector<T>& x, int64_t rows, int64_t D, int64_t S, std::vector<T> grad) {
    SCOPED_TRACE(::testing::Message() << rows << " x " << D << ", S " << S);
    auto products = uniform<T>(rows * S, S);
    DeviceArray<T> device_x(x), device_products(products), scaled(rows * S), device_grad(grad);
    cuda::soft_logits<T>(
        device_x.data(), device_products.data(), scaled.data(), D, S, rows, nullptr);
    cuda::soft_logits<T>(
        device_x.data(), device_products.data(), device_products.data(), D, S, rows, nullptr);
    expect_same(device_products.values(), scaled.values());
    T* in_place = products.data();
    cpu::soft_logits(x.data(), static_cast<const T*>(in_place), in_place, D, S, 0, rows);
    expect_near(scaled.values(), products, kRounding<T>);

    cuda::soft_logits_backward<T>(device_x.data(), device_grad.data(), D, rows, nullptr);
    cpu::soft_logits_backward(x.data(), grad.data(), D, 0, rows);
    expect_near(device_grad.values(), grad, kRounding<T>);
  }
  static void expect_as_on_cpu(const std::vector<T>& x, int64_t rows, int64_t D, int64_t S) {
    expect_as_on_cpu(x, rows, D, S, uniform<T>(rows * D, 3));
  }
};
TYPED_TEST_SUITE(CudaSoftLogits, Floats);

// Rows in pieces of 16 bytes and entry by entry.
TYPED_TEST(CudaSoftLogits, AsOnTheCpu) {
  using T = TypeParam;
  for (const int64_t D : {1, 5, 8, 31, 128, 192, 769}) {
    for (const int64_t S : {0, 1, 4, 37}) {
      auto x = uniform<T>(11 * D, D);
      std::fill(x.begin(), x.begin() + D, T{0});
      this->expect_as_on_cpu(x, 11, D, S);
    }
  }
}

TYPED_TEST(CudaSoftLogits, NoTokenIsTooLongAndNoneIsHidden) {
  using T = TypeParam;
  for (const T value : {T{1e30}, T{1e-30}, kInf<T>, kNaN<T>}) {
    this->expect_as_on_cpu(std::vector<T>(2 * 8, value), 2, 8, 3, std::vector<T>(2 * 8));
  }
}

TYPED_TEST(CudaSoftLogits, EmptyShapes) {
  using T = TypeParam;
  this->expect_as_on_cpu({}, 0, 3, 4);
  this->expect_as_on_cpu({}, 2, 0, 4);
  this->expect_as_on_cpu({1, 2}, 2, 1, 0);
  DeviceArray<T> none(0);
  cuda::soft_logits<T>(none.data(), none.data(), none.data(), 3, 0, 0, nullptr);
}

}  // namespace
}  // namespace vmoe
