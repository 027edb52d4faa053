#include "assign_slots.h"

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, K, E, C;
};

template <typename T>
class AssignSlots : public ::testing::Test {
 public:
  // True when token a is served before token b.
  static bool served_before(const T* priority, int64_t a, int64_t b) {
    if (!priority) return a < b;
    const T left = priority[a], right = priority[b];
    if (std::isnan(left) != std::isnan(right)) return std::isnan(left);
    if (left > right || left < right) return left > right;
    return a < b;
  }

  // By definition: a request's position is how many for its expert go before it.
  static void expect_ranks(
      const Shape& shape, const std::vector<int32_t>& expert, const std::vector<T>* priority) {
    const auto [G, tokens, K, E, C] = shape;
    Guarded<int32_t> slot(G * tokens * K), source(G * E * C);
    cpu::assign_slots(
        expert.data(), priority ? priority->data() : nullptr, slot.data(), source.data(), tokens, K,
        E, C, 0, G);
    EXPECT_TRUE(slot.fences_stand() && source.fences_stand());
    std::vector<int32_t> holder(G * E * C, -1);
    for (int64_t g = 0; g < G; ++g) {
      const int32_t* wanted = expert.data() + g * tokens * K;
      const T* rank = priority ? priority->data() + g * tokens : nullptr;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < K; ++k) {
          const int32_t e = wanted[t * K + k];
          int64_t before = 0;
          for (int64_t other = 0; other < tokens; ++other) {
            for (int64_t j = 0; j < K; ++j) {
              if (wanted[other * K + j] != e) continue;
              before += j < k || (j == k && served_before(rank, other, t));
            }
          }
          const bool placed = e >= 0 && e < E && before < C;
          const int64_t at = placed ? e * C + before : -1;
          ASSERT_EQ(slot.data()[(g * tokens + t) * K + k], at) << "token " << t << " choice " << k;
          if (placed) holder[g * E * C + at] = static_cast<int32_t>(t * K + k);
        }
      }
    }
    EXPECT_EQ(source.values(), holder);
  }
};
TYPED_TEST_SUITE(AssignSlots, Floats);

TYPED_TEST(AssignSlots, RanksRequests) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1, 1, 1},
        {2, 7, 1, 3, 2},
        {3, 12, 2, 4, 4},
        {1, 20, 4, 4, 5},
        {2, 9, 3, 1, 30},
        {1, 8, 2, 5, 0},
        {1, 63, 2, 3, 40},
        {1, 64, 1, 2, 20},
        {2, 300, 3, 7, 90},
        {1, 40, 2, 3, 1}}) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      const auto expert = integers(shape.G * shape.T * shape.K, seed, 0, shape.E - 1);
      this->expect_ranks(shape, expert, nullptr);
      const auto distinct = uniform<T>(shape.G * shape.T, seed + 10);
      this->expect_ranks(shape, expert, &distinct);
      const auto ties = tied<T>(shape.G * shape.T, seed + 20);
      this->expect_ranks(shape, expert, &ties);
    }
  }
}

TYPED_TEST(AssignSlots, ServesFirstChoicesFirst) {
  using T = TypeParam;
  // Three tokens want expert 0: token 2 as its first choice, 0 and 1 as their second.
  const std::vector<int32_t> expert{1, 0, 1, 0, 0, 1};
  std::vector<int32_t> slot(6), source(4);
  cpu::assign_slots(
      expert.data(), static_cast<const T*>(nullptr), slot.data(), source.data(), 3, 2, 2, 2, 0, 1);
  EXPECT_EQ(slot, (std::vector<int32_t>{2, 1, 3, -1, 0, -1}));
  EXPECT_EQ(source, (std::vector<int32_t>{4, 1, 0, 2}));
}

TYPED_TEST(AssignSlots, PriorityDecidesWhoIsDropped) {
  using T = TypeParam;
  const std::vector<int32_t> expert(6, 0);
  const std::vector<T> priority{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, T{0}};
  std::vector<int32_t> slot(6), source(4);
  cpu::assign_slots(expert.data(), priority.data(), slot.data(), source.data(), 6, 1, 1, 4, 0, 1);
  EXPECT_EQ(source, (std::vector<int32_t>{4, 3, 0, 1}));
  EXPECT_EQ(slot, (std::vector<int32_t>{2, 3, -1, 1, 0, -1}));
}

TYPED_TEST(AssignSlots, ManyTokensOfStrangePriority) {
  using T = TypeParam;
  const std::vector<T> strange{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, -kNaN<T>, T{1e-30}, -T{1e30}};
  std::mt19937_64 random(9);
  const Shape shape{1, 400, 2, 5, 70};
  std::vector<T> priority(shape.T);
  for (T& value : priority) value = strange[random() % strange.size()];
  const auto expert = integers(shape.T * shape.K, 10, 0, shape.E - 1);
  this->expect_ranks(shape, expert, &priority);
  const std::vector<T> all_equal(shape.T, T{3});
  this->expect_ranks(shape, expert, &all_equal);
}

TYPED_TEST(AssignSlots, ExpertOutOfRangeIsNoRequest) {
  using T = TypeParam;
  const std::vector<int32_t> strange{-1, 3, INT32_MIN, INT32_MAX, 4, 0, 1, 2};
  std::mt19937_64 random(4);
  const Shape shape{2, 10, 2, 3, 2};
  std::vector<int32_t> expert(40);
  for (int32_t& e : expert) e = strange[random() % strange.size()];
  this->expect_ranks(shape, expert, nullptr);
  const auto priority = tied<T>(20, 5);
  this->expect_ranks(shape, expert, &priority);
  this->expect_ranks(shape, std::vector<int32_t>(40, -1), nullptr);
  this->expect_ranks(shape, std::vector<int32_t>(40, 3), nullptr);
}

TYPED_TEST(AssignSlots, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 3, 2, 4, 2}, {2, 0, 2, 4, 2}, {2, 3, 0, 4, 2}, {2, 3, 2, 0, 2}, {2, 3, 2, 4, 0}}) {
    const std::vector<int32_t> expert(shape.G * shape.T * shape.K, 0);
    this->expect_ranks(shape, expert, nullptr);
    const std::vector<TypeParam> priority(shape.G * shape.T, 1);
    this->expect_ranks(shape, expert, &priority);
  }
}

TYPED_TEST(AssignSlots, PiecesMakeTheWhole) {
  using T = TypeParam;
  const int64_t G = 5, tokens = 9, K = 2, E = 3, C = 4;
  const auto expert = integers(G * tokens * K, 6, -1, E);
  const auto priority = tied<T>(G * tokens, 7);
  expect_pieces<int32_t>(G, tokens * K, [&](int64_t begin, int64_t end, int32_t* slot) {
    std::vector<int32_t> source(G * E * C);
    cpu::assign_slots(
        expert.data(), priority.data(), slot, source.data(), tokens, K, E, C, begin, end);
  });
  expect_pieces<int32_t>(G, E * C, [&](int64_t begin, int64_t end, int32_t* source) {
    std::vector<int32_t> slot(G * tokens * K);
    cpu::assign_slots(
        expert.data(), priority.data(), slot.data(), source, tokens, K, E, C, begin, end);
  });
}

}  // namespace
}  // namespace vmoe
