#include "ksparse_projection.h"

#include "device.h"

namespace vmoe {
namespace {

template <typename T>
class CudaKsparseProjection : public ::testing::Test {
 public:
  static void expect_as_on_cpu(const std::vector<T>& x, int64_t rows, int64_t n, int64_t k) {
    SCOPED_TRACE(::testing::Message() << "rows " << rows << " n " << n << " k " << k);
    std::vector<T> out(rows * n);
    cpu::ksparse_projection(x.data(), out.data(), n, k, 0, rows);
    DeviceArray<T> device_x(x), device_out(rows * n);
    cuda::ksparse_projection(device_x.data(), device_out.data(), n, k, rows, nullptr);
    const auto values = device_out.values();
    expect_near(values, out, kRounding<T>);
    for (int64_t i = 0; i < rows * n; ++i) {  // the support must be the same, also with ties
      EXPECT_EQ(values[i] == 0, out[i] == 0) << "at " << i;
    }
  }
};
TYPED_TEST_SUITE(CudaKsparseProjection, Floats);

// Depending on its length, a row takes some lanes of a warp, a warp, a block, or a block without
// shared memory for the row.
TYPED_TEST(CudaKsparseProjection, RowsOfAnyLength) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 7, 8, 16, 17, 32, 33, 100, 196, 1024, 1025, 3000, 60000}) {
    for (const int64_t k : {int64_t{1}, int64_t{3}, n / 8, n / 2, n - 1, n}) {
      if (k < 1 || k > n || (n > 5000 && k != 1 && k != n / 8 && k != n)) continue;
      const int64_t rows = n < 200 ? 37 : n < 5000 ? 3 : 1;
      for (const double spread : {0.01, 1.0}) {
        this->expect_as_on_cpu(uniform<T>(rows * n, n + k, -spread, spread), rows, n, k);
      }
      this->expect_as_on_cpu(tied<T>(rows * n, n + k), rows, n, k);
    }
  }
  this->expect_as_on_cpu(std::vector<T>(2 * 1500, T{-1}), 2, 1500, 300);
}

TYPED_TEST(CudaKsparseProjection, ExtremeValues) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const T inf = kInf<T>, nan = kNaN<T>;
  const std::vector<std::vector<T>> rows{
      {T{1e4}, -T{1e4}, 0},
      {Limits::max(), 0, Limits::lowest()},
      {Limits::lowest() / 2, Limits::lowest(), -inf},
      {Limits::max(), Limits::max(), 0},
      {Limits::denorm_min(), 0, -T{0}},
      {-inf, 1, 1},
      {-inf, -T{1e4}, -inf},
      {nan, 0, 1},
      {0, -nan, 1},
      {inf, 0, 1},
      {inf, inf, 0},
      {inf, -inf, 0},
      {nan, inf, -inf},
      {-inf, -inf, -inf},
      {T{0.5}, T{0.5}, T{0.5}}};
  std::vector<T> x;
  for (const auto& row : rows) x.insert(x.end(), row.begin(), row.end());
  for (const int64_t k : {1, 2, 3}) {
    this->expect_as_on_cpu(x, static_cast<int64_t>(rows.size()), 3, k);
  }
  for (const int64_t n : {40, 1100}) {
    for (const auto& row : rows) {
      std::vector<T> repeated(n);
      for (int64_t i = 0; i < n; ++i) repeated[i] = row[i % 3];
      for (const int64_t k : {int64_t{1}, n / 2, n}) this->expect_as_on_cpu(repeated, 1, n, k);
    }
  }
}

TYPED_TEST(CudaKsparseProjection, BackwardAsOnCpu) {
  using T = TypeParam;
  for (const int64_t n : {0, 1, 2, 7, 8, 9, 255, 257, 600}) {
    for (const int64_t B : {1, 2, 31, 32, 33, 70}) {
      for (const int64_t A : {0, 1, 3}) {
        SCOPED_TRACE(::testing::Message() << "A " << A << " n " << n << " B " << B);
        auto grad = uniform<T>(A * n * B, n, -1, 1);
        auto out = tied<T>(A * n * B, B);
        if (n > 1 && A > 0) {
          out[0] = 0, grad[0] = kInf<T>;  // not in the support
          out[B] = kNaN<T>;
        }
        std::vector<T> wanted(A * n * B);
        cpu::ksparse_projection_backward(grad.data(), out.data(), wanted.data(), n, B, 0, A);
        DeviceArray<T> device_grad(grad), device_out(out), grad_x(A * n * B);
        cuda::ksparse_projection_backward(
            device_grad.data(), device_out.data(), grad_x.data(), A, n, B, nullptr);
        expect_near(grad_x.values(), wanted, 4 * kRounding<T>);
      }
    }
  }
}

TYPED_TEST(CudaKsparseProjection, EmptyShapes) {
  this->expect_as_on_cpu({}, 0, 3, 2);
  this->expect_as_on_cpu({}, 3, 0, 0);
  this->expect_as_on_cpu({1, 2, 3}, 1, 3, 0);
}

}  // namespace
}  // namespace vmoe
