#include "topk.h"

#include "testing.h"

namespace vmoe {
namespace {

// Sorts the indices of the whole axis by the definition of the order, with a stable sort.
template <typename T>
std::vector<int32_t> sorted_axis(const T* x, int64_t n, int64_t stride) {
  std::vector<int32_t> index(n);
  for (int64_t i = 0; i < n; ++i) index[i] = static_cast<int32_t>(i);
  std::stable_sort(index.begin(), index.end(), [&](int32_t i, int32_t j) {
    const T a = x[i * stride], b = x[j * stride];
    return std::isnan(a) ? !std::isnan(b) : a > b;
  });
  return index;
}

template <typename T>
class Topk : public ::testing::Test {
 public:
  static void expect_sorted(const std::vector<T>& x, int64_t N, int64_t n, int64_t M, int64_t k) {
    SCOPED_TRACE(::testing::Message() << "N " << N << " n " << n << " M " << M << " k " << k);
    Guarded<T> values(N * M * k);
    Guarded<int32_t> indices(N * M * k);
    cpu::topk(x.data(), values.data(), indices.data(), n, M, k, 0, N * M);
    EXPECT_TRUE(values.fences_stand() && indices.fences_stand());
    for (int64_t a = 0; a < N; ++a) {
      for (int64_t m = 0; m < M; ++m) {
        const T* axis = x.data() + a * n * M + m;
        const auto wanted = sorted_axis(axis, n, M);
        for (int64_t j = 0; j < k; ++j) {
          const int64_t at = (a * M + m) * k + j;
          ASSERT_EQ(indices.data()[at], wanted[j]) << "pick " << j << " of row " << a * M + m;
          // The value is the picked entry to the bit, with the sign of a zero and a NaN payload.
          EXPECT_EQ(memcmp(&values.data()[at], &axis[wanted[j] * M], sizeof(T)), 0);
        }
      }
    }
  }
};
TYPED_TEST_SUITE(Topk, Floats);

TYPED_TEST(Topk, IsAStableSort) {
  using T = TypeParam;
  for (const int64_t M : {1, 3}) {
    for (const int64_t n : {1, 2, 7, 8, 9, 10, 33, 200}) {
      for (const int64_t k : {0, 1, 2, 7, 8, 9, 16, 32, 199, 200}) {
        if (k > n) continue;
        this->expect_sorted(uniform<T>(2 * n * M, 10 * n + k), 2, n, M, k);
        this->expect_sorted(tied<T>(2 * n * M, 10 * n + k), 2, n, M, k);
        this->expect_sorted(std::vector<T>(2 * n * M, T{1}), 2, n, M, k);
      }
    }
  }
}

// Numbers of rows and of columns around the vector width, where rows are padded and blocks end.
TYPED_TEST(Topk, AnyNumberOfRowsAndColumns) {
  using T = TypeParam;
  for (const int64_t count : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}) {
    for (const int64_t n : {1, 3, 8, 15, 16, 17, 31, 40}) {
      for (const int64_t k : {1, 2, 5, 8, 9, 17}) {
        if (k > n) continue;
        for (const auto& x : {uniform<T>(2 * n * count, n), tied<T>(2 * n * count, k)}) {
          this->expect_sorted(x, 2 * count, n, 1, k);
          this->expect_sorted(x, 2, n, count, k);
        }
      }
    }
  }
}

// Numbers of picks around the limits between the sorting methods. For some inputs find_cut
// (cpu/keys.h) moves its candidate keys to a buffer, for others not.
TYPED_TEST(Topk, ManyPicks) {
  using T = TypeParam;
  for (const int64_t M : {1, 2, 17}) {
    for (const int64_t n : {128, 129, 300, 1500}) {
      for (const int64_t k : {9, 10, 63, 64, 65, 127, 128, 129, 299, 300, 1499, 1500}) {
        if (k > n) continue;
        this->expect_sorted(uniform<T>(n * M, n + k), 1, n, M, k);
        this->expect_sorted(tied<T>(n * M, n + k, 2), 1, n, M, k);
        this->expect_sorted(tied<T>(n * M, n + k, n / 3), 1, n, M, k);
        this->expect_sorted(std::vector<T>(n * M, T{-1}), 1, n, M, k);
      }
    }
  }
}

// One entry is far from all other entries, so almost all keys in between are unused.
TYPED_TEST(Topk, ManyPicksOfAWideRange) {
  using T = TypeParam;
  for (const T far : {kInf<T>, -kInf<T>, kNaN<T>, std::numeric_limits<T>::lowest()}) {
    auto x = uniform<T>(700, 3, 1, 1 + 1e-5);
    x[333] = far;
    for (const int64_t k : {9, 40, 400, 699}) this->expect_sorted(x, 1, 700, 1, k);
  }
  std::vector<T> x;
  for (int i = 0; i < 600; ++i) x.push_back(std::ldexp(i % 2 ? T{-1} : T{1}, i % 120 - 60));
  for (const int64_t k : {9, 40, 301, 599}) this->expect_sorted(x, 1, 600, 1, k);
}

TYPED_TEST(Topk, ExtremeValues) {
  using T = TypeParam;
  const std::vector<T> special = extremes<T>();
  std::mt19937_64 random(2);
  for (const int64_t k : {9, 100, 150, 600}) {
    std::vector<T> x(3 * 600);
    for (T& value : x) value = special[random() % special.size()];
    this->expect_sorted(x, 3, 600, 1, k);
    this->expect_sorted(x, 1, 600, 3, k);
  }
  for (const int64_t k : {1, 3, 8, 9, 24}) {
    std::vector<T> x(4 * 24);
    for (T& value : x) value = special[random() % special.size()];
    this->expect_sorted(x, 4, 24, 1, k);
    this->expect_sorted(x, 1, 24, 4, k);
  }
  for (const T only : {kNaN<T>, -kInf<T>, kInf<T>}) {
    for (const int64_t k : {1, 8, 9, 24})
      this->expect_sorted(std::vector<T>(24, only), 1, 24, 1, k);
  }
}

TYPED_TEST(Topk, NaNComesFirstAndZerosTie) {
  using T = TypeParam;
  const std::vector<T> x{-T{0}, T{0}, kNaN<T>, kInf<T>, -T{0}};
  std::vector<T> values(5);
  std::vector<int32_t> indices(5);
  cpu::topk(x.data(), values.data(), indices.data(), 5, 1, 5, 0, 1);
  EXPECT_EQ(indices, (std::vector<int32_t>{2, 3, 0, 1, 4}));
  EXPECT_TRUE(std::isnan(values[0]));
  EXPECT_TRUE(std::signbit(values[2]) && !std::signbit(values[3]) && std::signbit(values[4]));
}

TYPED_TEST(Topk, EmptyShapes) {
  using T = TypeParam;
  const std::vector<T> none;
  this->expect_sorted(none, 0, 5, 1, 2);  // no rows
  this->expect_sorted(none, 3, 0, 2, 0);  // n = 0
  this->expect_sorted(none, 3, 4, 0, 2);  // M = 0
}

TYPED_TEST(Topk, PiecesGiveTheSameBits) {
  using T = TypeParam;
  for (const int64_t k : {3, 12}) {
    const int64_t N = 4, n = 15, M = 19, rows = N * M;
    const auto x = tied<T>(N * n * M, 3, 5);
    expect_pieces<T>(rows, k, [&](int64_t begin, int64_t end, T* values) {
      std::vector<int32_t> indices(rows * k);
      cpu::topk(x.data(), values, indices.data(), n, M, k, begin, end);
    });
    expect_pieces<int32_t>(rows, k, [&](int64_t begin, int64_t end, int32_t* indices) {
      std::vector<T> values(rows * k);
      cpu::topk(x.data(), values.data(), indices, n, M, k, begin, end);
    });
  }
}

}  // namespace
}  // namespace vmoe
