#include "common/order.h"

#include "testing.h"

namespace vmoe {
namespace {

template <typename T>
class Order : public ::testing::Test {
 public:
  using Limits = std::numeric_limits<T>;

  // Distinct values, from the last chosen to the first chosen.
  static std::vector<T> ascending() {
    return {
        -Limits::infinity(),
        Limits::lowest(),
        -T{1e4},
        -1 - Limits::epsilon(),
        -1,
        -Limits::min(),
        -Limits::min() / 2,
        -Limits::denorm_min(),
        0,
        Limits::denorm_min(),
        Limits::min() / 2,
        Limits::min(),
        1 - Limits::epsilon(),
        1,
        1 + Limits::epsilon(),
        T{1e4},
        Limits::max(),
        Limits::infinity(),
        Limits::quiet_NaN()};
  }
};
TYPED_TEST_SUITE(Order, Floats);

TYPED_TEST(Order, KeysGrowWithValues) {
  const auto values = this->ascending();
  for (size_t i = 1; i < values.size(); ++i) {
    EXPECT_LT(order_key(values[i - 1]), order_key(values[i])) << values[i - 1] << ", " << values[i];
  }
}

TYPED_TEST(Order, ZerosTie) { EXPECT_EQ(order_key(TypeParam{0}), order_key(-TypeParam{0})); }

TYPED_TEST(Order, EveryNaNHasTheSameLargestKey) {
  using T = TypeParam;
  T signalling = std::numeric_limits<T>::signaling_NaN(), payload;
  std::vector<unsigned char> ones(sizeof(T), 0xFF);
  memcpy(&payload, ones.data(), sizeof(T));
  const auto largest = std::numeric_limits<OrderKey<T>>::max();
  for (const T nan : {kNaN<T>, -kNaN<T>, signalling, payload}) EXPECT_EQ(order_key(nan), largest);
}

TYPED_TEST(Order, KeysCompareAsValues) {
  using T = TypeParam;
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    // Random bits, not random numbers, so that all exponents occur.
    T a, b;
    const uint64_t left = random(), right = i % 4 ? random() : left ^ (random() & 7);
    memcpy(&a, &left, sizeof(T));
    memcpy(&b, &right, sizeof(T));
    if (std::isnan(a) || std::isnan(b)) continue;
    EXPECT_EQ(order_key(a) < order_key(b), a < b) << a << ", " << b;
    EXPECT_EQ(order_key(a) == order_key(b), a == b) << a << ", " << b;
  }
}

TYPED_TEST(Order, PicksAreTotallyOrdered) {
  using T = TypeParam;
  std::vector<Pick<OrderKey<T>>> picks;
  int32_t index = 0;
  for (int copy = 0; copy < 2; ++copy) {
    for (const T value : this->ascending()) picks.push_back({order_key(value), index++});
  }
  for (const auto& a : picks) {
    EXPECT_FALSE(a.before(a));
    for (const auto& b : picks) {
      if (a.index == b.index) continue;
      EXPECT_NE(a.before(b), b.before(a));
      const bool wanted = a.key == b.key ? a.index < b.index : a.key > b.key;
      EXPECT_EQ(a.before(b), wanted);
    }
  }
}

}  // namespace
}  // namespace vmoe
