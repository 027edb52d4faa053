// testing -- inputs, guarded buffers and comparisons that the tests of several ops share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace vmoe {

using Floats = ::testing::Types<float, double>;

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// The rounding error of a short sum of numbers of order 1.
template <typename T>
constexpr double kRounding = 16.0 * std::numeric_limits<T>::epsilon();

// A number in [0, 1), computed from the bits of the generator, so that every standard library gives
// the same number.
inline double uniform(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1p-53;
}

inline int64_t integer(std::mt19937_64& random, int64_t low, int64_t high) {  // in [low, high]
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

template <typename T>
std::vector<T> uniform(int64_t size, uint64_t seed, double low = -2, double high = 2) {
  std::mt19937_64 random(seed);
  std::vector<T> out(size);
  for (T& value : out) value = static_cast<T>(low + (high - low) * uniform(random));
  return out;
}

// Values that a comparison may get wrong: zeros, infinities, NaN, and the smallest and largest
// numbers.
template <typename T>
std::vector<T> extremes() {
  using Limits = std::numeric_limits<T>;
  return {
      0,
      -T{0},
      kInf<T>,
      -kInf<T>,
      kNaN<T>,
      -kNaN<T>,
      Limits::denorm_min(),
      -Limits::denorm_min(),
      Limits::max(),
      Limits::lowest(),
      T{1e4},
      -T{1e4}};
}

// Few distinct values, so that many tie.
template <typename T>
std::vector<T> tied(int64_t size, uint64_t seed, int64_t levels = 3) {
  std::mt19937_64 random(seed);
  std::vector<T> out(size);
  for (T& value : out) value = static_cast<T>(integer(random, 0, levels - 1)) / 2;
  return out;
}

inline std::vector<int32_t> integers(int64_t size, uint64_t seed, int64_t low, int64_t high) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> out(size);
  for (int32_t& value : out) value = static_cast<int32_t>(integer(random, low, high));
  return out;
}

// The elements of group `g`, with `size` elements per group.
template <typename T>
std::vector<T> group(const std::vector<T>& all, int64_t g, int64_t size) {
  return {all.begin() + g * size, all.begin() + (g + 1) * size};
}

// Expects |actual - wanted| <= tolerance * (1 + |wanted|), and the same infinities and NaN.
template <typename A, typename B>
void expect_near(const std::vector<A>& actual, const std::vector<B>& wanted, double tolerance) {
  ASSERT_EQ(actual.size(), wanted.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i], w = wanted[i];
    const bool same = std::isnan(w)   ? std::isnan(a)
                      : std::isinf(w) ? a == w
                                      : std::abs(a - w) <= tolerance * (1 + std::abs(w));
    EXPECT_TRUE(same) << "[" << i << "] is " << a << ", wanted " << w;
  }
}

template <typename T>
bool all_nan(const std::vector<T>& values) {
  return std::all_of(values.begin(), values.end(), [](T value) { return std::isnan(value); });
}

// A buffer between two guard areas (fences). Buffer and fences are filled with a byte that kernels
// are unlikely to write, so that a test recognises elements that were not written.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size), memory_(size + 2 * kFence) {
    memset(memory_.data(), kByte, memory_.size() * sizeof(T));
  }

  T* data() { return memory_.data() + kFence; }
  std::vector<T> values() const {
    return {memory_.begin() + kFence, memory_.begin() + kFence + size_};
  }

  bool untouched(int64_t i) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&memory_[kFence + i]);
    return std::all_of(bytes, bytes + sizeof(T), [](unsigned char b) { return b == kByte; });
  }
  bool same(int64_t i, const Guarded& other) const {
    return memcmp(&memory_[kFence + i], &other.memory_[kFence + i], sizeof(T)) == 0;
  }
  bool fences_stand() const {
    for (int64_t i = 0; i < kFence; ++i) {
      if (!untouched(i - kFence) || !untouched(size_ + i)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kFence = 64;
  static constexpr unsigned char kByte = 0xA5;
  int64_t size_;
  std::vector<T> memory_;
};

// Calls run(begin, end, out) for all `rows` rows, and for pieces [begin, end) of the rows. out[i]
// belongs to row row_of(i). The call for all rows must write every element. The call for a piece
// must write the same bits to the elements of the piece, and nothing else.
template <typename T, typename Run, typename RowOf>
void expect_pieces(int64_t size, int64_t rows, Run&& run, RowOf&& row_of) {
  Guarded<T> whole(size);
  run(int64_t{0}, rows, whole.data());
  EXPECT_TRUE(whole.fences_stand());
  for (int64_t i = 0; i < size; ++i) {
    EXPECT_FALSE(whole.untouched(i)) << "[" << i << "] was not written";
  }
  const int64_t a = rows / 3, b = rows - rows / 3;
  for (const auto& [begin, end] :
       {std::pair{int64_t{0}, int64_t{0}},
        {rows, rows},
        {0, a},
        {a, b},
        {b, rows},
        {rows > 0 ? rows - 1 : 0, rows}}) {
    Guarded<T> piece(size);
    run(begin, end, piece.data());
    EXPECT_TRUE(piece.fences_stand()) << "rows [" << begin << ", " << end << ")";
    for (int64_t i = 0; i < size; ++i) {
      const bool inside = row_of(i) >= begin && row_of(i) < end;
      EXPECT_TRUE(inside ? piece.same(i, whole) : piece.untouched(i))
          << "rows [" << begin << ", " << end << "), element " << i;
    }
  }
}

// expect_pieces with `width` consecutive elements per row.
template <typename T, typename Run>
void expect_pieces(int64_t rows, int64_t width, Run&& run) {
  expect_pieces<T>(rows * width, rows, run, [=](int64_t i) { return i / width; });
}

// Compares `gradient` with central differences of `loss` at `x`. For an infinite x it expects 0.
template <typename Loss>
void expect_gradient(
    const std::vector<double>& gradient, const std::vector<double>& x, Loss&& loss,
    double tolerance = 1e-7, double step = 1e-5) {
  ASSERT_EQ(gradient.size(), x.size());
  std::vector<double> moved = x;
  for (size_t i = 0; i < x.size(); ++i) {
    double wanted = 0;
    if (std::isfinite(x[i])) {
      moved[i] = x[i] + step;
      const double above = loss(moved);
      moved[i] = x[i] - step;
      wanted = (above - loss(moved)) / (2 * step);
      moved[i] = x[i];
    }
    EXPECT_NEAR(gradient[i], wanted, tolerance * (1 + std::abs(wanted))) << "of x[" << i << "]";
  }
}

inline double inner(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace vmoe
