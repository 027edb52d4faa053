#include "topk.h"

#include "device.h"

namespace vmoe {
namespace {

template <typename T>
class CudaTopk : public ::testing::Test {
 public:
  // Expects the bits of the CPU kernel.
  static void expect_as_on_cpu(
      const std::vector<T>& x, int64_t N, int64_t n, int64_t M, int64_t k) {
    SCOPED_TRACE(::testing::Message() << "N " << N << " n " << n << " M " << M << " k " << k);
    const int64_t rows = N * M;
    std::vector<T> values(rows * k);
    std::vector<int32_t> indices(rows * k);
    cpu::topk(x.data(), values.data(), indices.data(), n, M, k, 0, rows);
    DeviceArray<T> device_x(x), device_values(rows * k);
    DeviceArray<int32_t> device_indices(rows * k);
    DeviceArray<char> workspace(static_cast<int64_t>(cuda::topk_workspace<T>(n, M, k, rows)));
    cuda::topk(
        device_x.data(), device_values.data(), device_indices.data(), n, M, k, rows,
        workspace.data(), nullptr);
    EXPECT_EQ(device_indices.values(), indices);
    expect_same(device_values.values(), values);
  }
};
TYPED_TEST_SUITE(CudaTopk, Floats);

// The lengths are around multiples of the numbers of lanes, of entries per lane and of entries per
// load.
TYPED_TEST(CudaTopk, FewOfRows) {
  using T = TypeParam;
  for (const int64_t n : {1, 3, 4, 15, 16, 17, 32, 33, 64, 100, 128, 130, 512, 600, 1024}) {
    for (const int64_t k : {1, 2, 5, 16}) {
      if (k > n) continue;
      const int64_t rows = n < 200 ? 67 : 9;
      this->expect_as_on_cpu(uniform<T>(rows * n, n + k), rows, n, 1, k);
      this->expect_as_on_cpu(tied<T>(rows * n, n + k), rows, n, 1, k);
    }
  }
}

TYPED_TEST(CudaTopk, FewOfColumns) {
  using T = TypeParam;
  for (const int64_t M : {2, 8, 31, 32, 33, 70}) {
    for (const int64_t n : {1, 2, 31, 49, 196, 300}) {
      for (const int64_t k : {1, 6, 16}) {
        if (k > n) continue;
        this->expect_as_on_cpu(uniform<T>(2 * n * M, n + k), 2, n, M, k);
        this->expect_as_on_cpu(tied<T>(2 * n * M, n + k), 2, n, M, k);
      }
    }
  }
}

TYPED_TEST(CudaTopk, ManyPicks) {
  using T = TypeParam;
  for (const int64_t M : {1, 3}) {
    for (const int64_t n : {17, 200, 255, 256, 257, 1025, 3000}) {
      const int64_t N = n > 1000 ? 1 : 2;
      for (const int64_t k : {1, 17, 64, 199, 256, 1024}) {
        if (k > n || (k <= 16 && n <= 1024)) continue;
        this->expect_as_on_cpu(uniform<T>(N * n * M, n + k), N, n, M, k);
        this->expect_as_on_cpu(tied<T>(N * n * M, n + k, 2), N, n, M, k);
        this->expect_as_on_cpu(tied<T>(N * n * M, n + k, n / 3), N, n, M, k);
        this->expect_as_on_cpu(std::vector<T>(N * n * M, T{-1}), N, n, M, k);
      }
      this->expect_as_on_cpu(tied<T>(N * n * M, n, n / 2), N, n, M, n);
    }
  }
}

// Rows that are too long for shared memory, and more picks than a block sorts.
TYPED_TEST(CudaTopk, LongAxes) {
  using T = TypeParam;
  const int64_t n = 60000;
  for (const int64_t k : {3, 300}) this->expect_as_on_cpu(tied<T>(n, 1, 5000), 1, n, 1, k);
  for (const int64_t N : {1, 2})
    this->expect_as_on_cpu(tied<T>(N * 5000, 1, 900), N, 5000, 1, 4500);
  this->expect_as_on_cpu(uniform<T>(5000 * 2, 1), 1, 5000, 2, 5000);
  // Keys that differ in their last digit only, or also in the first digits.
  std::vector<T> close(30000), apart(30000);
  for (int64_t i = 0; i < 30000; ++i) {
    close[i] = 1 + std::numeric_limits<T>::epsilon() * static_cast<T>(i * 7919 % 200);
    apart[i] = i % 4 ? close[i] : T{1e-30};
  }
  for (const int64_t k : {5, 1024, 3000, 4096}) {
    this->expect_as_on_cpu(close, 1, 30000, 1, k);
    this->expect_as_on_cpu(apart, 1, 30000, 1, k);
  }
  for (const int64_t k : {16, 17, 4095, 4096, 4097}) {
    this->expect_as_on_cpu(tied<T>(4097, k, 700), 1, 4097, 1, k);
  }
}

// The length of rows is a multiple of 16 bytes, but their addresses are not.
TYPED_TEST(CudaTopk, MisalignedRows) {
  using T = TypeParam;
  for (const int64_t n : {8, 64, 1024}) {
    const int64_t rows = 5, k = 3;
    const auto x = tied<T>(rows * n + 1, n);
    std::vector<T> values(rows * k);
    std::vector<int32_t> indices(rows * k);
    cpu::topk(x.data() + 1, values.data(), indices.data(), n, 1, k, 0, rows);
    DeviceArray<T> device_x(x), device_values(rows * k);
    DeviceArray<int32_t> device_indices(rows * k);
    cuda::topk<T>(
        device_x.data() + 1, device_values.data(), device_indices.data(), n, 1, k, rows, nullptr,
        nullptr);
    EXPECT_EQ(device_indices.values(), indices);
    expect_same(device_values.values(), values);
  }
}

TYPED_TEST(CudaTopk, ExtremeValues) {
  using T = TypeParam;
  const std::vector<T> special = extremes<T>();
  std::mt19937_64 random(2);
  for (const int64_t n : {24, 600, 1500}) {
    for (const int64_t k : {1, 3, 16, 20, 24, 300}) {
      if (k > n) continue;
      std::vector<T> x(4 * n);
      for (T& value : x) value = special[random() % special.size()];
      this->expect_as_on_cpu(x, 4, n, 1, k);
      this->expect_as_on_cpu(x, 1, n, 4, k);
      for (const T only : {kNaN<T>, -kInf<T>, kInf<T>}) {
        this->expect_as_on_cpu(std::vector<T>(n, only), 1, n, 1, k);
      }
    }
  }
}

TYPED_TEST(CudaTopk, EmptyShapes) {
  const std::vector<TypeParam> none;
  this->expect_as_on_cpu(none, 0, 5, 1, 2);
  this->expect_as_on_cpu(none, 3, 0, 2, 0);
  this->expect_as_on_cpu(none, 3, 4, 0, 2);
  this->expect_as_on_cpu({1, 2}, 1, 2, 1, 0);
}

}  // namespace
}  // namespace vmoe
