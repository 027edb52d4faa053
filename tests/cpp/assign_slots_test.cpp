#include "assign_slots.h"

#include "assign_slots_oracle.h"

namespace vmoe {
namespace {

template <typename T>
class AssignSlots : public ::testing::Test {
 public:
  static void expect_definition(
      const Requests& shape, const std::vector<int32_t>& expert, const std::vector<T>* priority) {
    SCOPED_TRACE(::testing::Message() << shape << (priority ? " with priority" : ""));
    Guarded<int32_t> slot(shape.count()), source(shape.all());
    cpu::assign_slots(
        expert.data(), priority ? priority->data() : nullptr, slot.data(), source.data(), shape,
        shape.K, 0, shape.G);
    EXPECT_TRUE(slot.fences_stand() && source.fences_stand());
    const Assigned wanted = assigned_by_definition(shape, expert, priority);
    EXPECT_EQ(slot.values(), wanted.slot);
    EXPECT_EQ(source.values(), wanted.source);
  }
};
TYPED_TEST_SUITE(AssignSlots, Floats);

TYPED_TEST(AssignSlots, RanksRequests) {
  using T = TypeParam;
  // G, T, E, C, K
  for (const Requests& shape :
       {Requests{1, 1, 1, 1, 1},
        {2, 7, 3, 2, 1},
        {3, 12, 4, 4, 2},
        {1, 20, 4, 5, 4},
        {2, 9, 1, 30, 3},
        {1, 8, 5, 0, 2},
        {1, 63, 3, 40, 2},
        {1, 64, 2, 20, 1},
        {2, 300, 7, 90, 3},
        {1, 40, 3, 1, 2}}) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      const auto expert = integers(shape.count(), seed, 0, shape.E - 1);
      this->expect_definition(shape, expert, nullptr);
      const auto distinct = uniform<T>(shape.all_tokens(), seed + 10);
      this->expect_definition(shape, expert, &distinct);
      const auto ties = tied<T>(shape.all_tokens(), seed + 20);
      this->expect_definition(shape, expert, &ties);
    }
  }
}

TYPED_TEST(AssignSlots, ServesFirstChoicesFirst) {
  using T = TypeParam;
  // Three tokens request expert 0: token 2 as its first choice, tokens 0 and 1 as their second.
  const std::vector<int32_t> expert{1, 0, 1, 0, 0, 1};
  std::vector<int32_t> slot(6), source(4);
  cpu::assign_slots(
      expert.data(), static_cast<const T*>(nullptr), slot.data(), source.data(), Slots{1, 3, 2, 2},
      2, 0, 1);
  EXPECT_EQ(slot, (std::vector<int32_t>{2, 1, 3, -1, 0, -1}));
  EXPECT_EQ(source, (std::vector<int32_t>{4, 1, 0, 2}));
}

TYPED_TEST(AssignSlots, PriorityDecidesWhoIsDropped) {
  using T = TypeParam;
  const std::vector<int32_t> expert(6, 0);
  const std::vector<T> priority{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, T{0}};
  std::vector<int32_t> slot(6), source(4);
  cpu::assign_slots(
      expert.data(), priority.data(), slot.data(), source.data(), Slots{1, 6, 1, 4}, 1, 0, 1);
  EXPECT_EQ(source, (std::vector<int32_t>{4, 3, 0, 1}));
  EXPECT_EQ(slot, (std::vector<int32_t>{2, 3, -1, 1, 0, -1}));
}

TYPED_TEST(AssignSlots, ExtremePriorities) {
  using T = TypeParam;
  const std::vector<T> strange{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, -kNaN<T>, T{1e-30}, -T{1e30}};
  std::mt19937_64 random(9);
  const Requests shape{1, 400, 5, 70, 2};
  std::vector<T> priority(shape.tokens);
  for (T& value : priority) value = strange[random() % strange.size()];
  const auto expert = integers(shape.count(), 10, 0, shape.E - 1);
  this->expect_definition(shape, expert, &priority);
  const std::vector<T> all_equal(shape.tokens, T{3});
  this->expect_definition(shape, expert, &all_equal);
}

TYPED_TEST(AssignSlots, ExpertOutOfRangeIsNoRequest) {
  using T = TypeParam;
  const std::vector<int32_t> strange{-1, 3, INT32_MIN, INT32_MAX, 4, 0, 1, 2};
  std::mt19937_64 random(4);
  const Requests shape{2, 10, 3, 2, 2};
  std::vector<int32_t> expert(40);
  for (int32_t& e : expert) e = strange[random() % strange.size()];
  this->expect_definition(shape, expert, nullptr);
  const auto priority = tied<T>(20, 5);
  this->expect_definition(shape, expert, &priority);
  this->expect_definition(shape, std::vector<int32_t>(40, -1), nullptr);
  this->expect_definition(shape, std::vector<int32_t>(40, 3), nullptr);
}

TYPED_TEST(AssignSlots, EmptyShapes) {
  for (const Requests& shape :
       {Requests{0, 3, 4, 2, 2},
        {2, 0, 4, 2, 2},
        {2, 3, 0, 2, 2},
        {2, 3, 4, 0, 2},
        {2, 3, 4, 2, 0}}) {
    const std::vector<int32_t> expert(shape.count(), 0);
    this->expect_definition(shape, expert, nullptr);
    const std::vector<TypeParam> priority(shape.all_tokens(), 1);
    this->expect_definition(shape, expert, &priority);
  }
}

TYPED_TEST(AssignSlots, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const Requests shape{5, 9, 3, 4, 2};
  const auto expert = integers(shape.count(), 6, -1, shape.E);
  const auto priority = tied<T>(shape.all_tokens(), 7);
  std::vector<int32_t> slot(shape.count()), source(shape.all());
  expect_pieces<int32_t>(
      shape.G, shape.tokens * shape.K, [&](int64_t begin, int64_t end, int32_t* out) {
        cpu::assign_slots(
            expert.data(), priority.data(), out, source.data(), shape, shape.K, begin, end);
      });
  expect_pieces<int32_t>(shape.G, shape.of_group(), [&](int64_t begin, int64_t end, int32_t* out) {
    cpu::assign_slots(expert.data(), priority.data(), slot.data(), out, shape, shape.K, begin, end);
  });
}

}  // namespace
}  // namespace vmoe
