#include "cpu/product.h"

#include "testing.h"

namespace vmoe {
namespace {

// A matrix with gaps between its rows or, if `turned`, between its columns.
template <typename T>
struct Operand {
  std::vector<T> memory;
  Matrix<const T> matrix;

  Operand(int64_t rows, int64_t columns, bool turned, uint64_t seed) {
    const int64_t lines = turned ? columns : rows, entries = turned ? rows : columns;
    const int64_t stride = entries + 3;
    memory = uniform<T>(lines * stride, seed);
    const T* data = memory.data();
    matrix = turned ? transposed(data, lines, entries, stride)
                    : vmoe::matrix(data, lines, entries, stride);
  }
  T* at(int64_t i, int64_t j) { return memory.data() + i * matrix.down + j * matrix.along; }
};

template <typename T>
std::vector<T> product(
    Matrix<const T> a, Matrix<const T> b, const std::vector<T>* added_to = nullptr) {
  const int64_t M = a.rows, N = b.columns, stride = N + 5;
  Guarded<T> out(M * stride);
  for (int64_t i = 0; added_to && i < M * N; ++i) {
    out.data()[i / N * stride + i % N] = (*added_to)[i];
  }
  const Matrix<T> to = matrix(out.data(), M, N, stride);
  multiply_add<T>(to, a, b, added_to == nullptr);
  EXPECT_TRUE(out.fences_stand());
  std::vector<T> values;
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) values.push_back(out.data()[i * stride + j]);
    for (int64_t j = N; j < stride; ++j) EXPECT_TRUE(out.untouched(i * stride + j));
  }
  return values;
}

template <typename T>
std::vector<double> wanted_product(Matrix<const T> a, Matrix<const T> b) {
  std::vector<double> out;
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < b.columns; ++j) {
      long double sum = 0;
      for (int64_t k = 0; k < a.columns; ++k) {
        sum += (long double)a.data[i * a.down + k * a.along] * b.data[k * b.down + j * b.along];
      }
      out.push_back((double)sum);
    }
  }
  return out;
}

template <typename T>
class Product : public ::testing::Test {};
TYPED_TEST_SUITE(Product, Floats);

TYPED_TEST(Product, IsTheSumOverKForAnyShape) {
  using T = TypeParam;
  std::mt19937_64 random(1);
  for (int64_t round = 0; round < 200; ++round) {
    const int64_t M = integer(random, 1, 45), N = integer(random, 1, 75);
    const int64_t K = round % 4 == 0 ? integer(random, 500, 1100) : integer(random, 1, 40);
    SCOPED_TRACE(::testing::Message() << "M " << M << " N " << N << " K " << K);
    const Operand<T> a(M, K, round & 1, 2 * round), b(K, N, round & 2, 2 * round + 1);
    const std::vector<double> wanted = wanted_product(a.matrix, b.matrix);
    const double tolerance = kRounding<T> * (1 + static_cast<double>(K) / 16);
    expect_near(product(a.matrix, b.matrix), wanted, tolerance);
    const auto before = uniform<T>(M * N, round);
    std::vector<double> sums;
    for (size_t i = 0; i < wanted.size(); ++i) sums.push_back(wanted[i] + before[i]);
    expect_near(product(a.matrix, b.matrix, &before), sums, tolerance);
  }
}

// More rows than a block of A has.
TYPED_TEST(Product, ManyRows) {
  using T = TypeParam;
  const Operand<T> a(1000, 300, false, 1), b(300, 33, true, 2);
  expect_near(product(a.matrix, b.matrix), wanted_product(a.matrix, b.matrix), 20 * kRounding<T>);
}

TYPED_TEST(Product, EmptyShapes) {
  using T = TypeParam;
  for (const auto& [M, K, N] : {std::array{0, 3, 2}, {2, 3, 0}, {0, 0, 0}}) {
    EXPECT_TRUE(
        product(Operand<T>(M, K, false, 1).matrix, Operand<T>(K, N, true, 2).matrix).empty());
  }
  const Operand<T> a(2, 0, false, 1), b(0, 3, false, 2);
  EXPECT_EQ(product(a.matrix, b.matrix), std::vector<T>(6, 0));
  const std::vector<T> before{1, 2, 3, 4, 5, 6};
  EXPECT_EQ(product(a.matrix, b.matrix, &before), before);
}

// An entry has the same bits in a product of 200 rows and of one row, and in any column.
TYPED_TEST(Product, BitsDoNotDependOnPosition) {
  using T = TypeParam;
  const int64_t M = 200, K = 700, N = 61;
  for (const bool turned : {false, true}) {
    const Operand<T> a(M, K, turned, 1), b(K, N, turned, 2);
    const std::vector<T> all = product(a.matrix, b.matrix);
    for (const int64_t i : {0, 13, 14, 199}) {
      for (const int64_t j : {0, 17, 60}) {
        Matrix<const T> row = a.matrix, column = b.matrix;
        row.data += i * row.down;
        row.rows = 1;
        column.data += j * column.along;
        column.columns = 1;
        EXPECT_EQ(product(row, column)[0], all[i * N + j]) << i << ", " << j;
      }
    }
  }
}

TYPED_TEST(Product, HugeAndNonFiniteNumbersStayInTheirRowAndColumn) {
  using T = TypeParam;
  const int64_t M = 20, K = 9, N = 40;
  for (const T bad : {kNaN<T>, kInf<T>, std::numeric_limits<T>::max()}) {
    for (const bool turned : {false, true}) {
      Operand<T> a(M, K, turned, 1), b(K, N, turned, 2);
      *a.at(15, 4) = bad;
      *b.at(5, 33) = bad;
      const std::vector<T> out = product(a.matrix, b.matrix);
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          EXPECT_EQ(std::abs(out[i * N + j]) < 1e3, i != 15 && j != 33) << i << ", " << j;
        }
      }
    }
  }
}

}  // namespace
}  // namespace vmoe
