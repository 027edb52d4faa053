#include "assign_slots.h"

#include "../assign_slots_oracle.h"
#include "device.h"

namespace vmoe {
namespace {

template <typename T>
class CudaAssignSlots : public ::testing::Test {
 public:
  static void expect_definition(
      const Requests& shape, const std::vector<int32_t>& expert, const std::vector<T>* priority) {
    SCOPED_TRACE(::testing::Message() << shape << (priority ? " with priority" : ""));
    DeviceArray<int32_t> device_expert(expert), slot(shape.count()), source(shape.all());
    DeviceArray<T> device_priority(priority ? *priority : std::vector<T>{});
    DeviceArray<char> workspace(
        static_cast<int64_t>(cuda::assign_slots_workspace<T>(priority != nullptr, shape, shape.K)));
    cuda::assign_slots(
        device_expert.data(), priority ? device_priority.data() : nullptr, slot.data(),
        source.data(), shape, shape.K, workspace.data(), nullptr);
    const Assigned wanted = assigned_by_definition(shape, expert, priority);
    EXPECT_EQ(slot.values(), wanted.slot);
    EXPECT_EQ(source.values(), wanted.source);
  }

  // Checks the priorities `ties`, and distinct priorities.
  static void expect_by_priority(
      const Requests& shape, const std::vector<int32_t>& expert, const std::vector<T>& ties) {
    expect_definition(shape, expert, &ties);
    const auto distinct = uniform<T>(shape.all_tokens(), 2);
    expect_definition(shape, expert, &distinct);
  }
};
TYPED_TEST_SUITE(CudaAssignSlots, Floats);

// The shapes have one and several chunks, warps without requests, buffers that are too small, and
// buffers that are larger than needed.
TYPED_TEST(CudaAssignSlots, RanksRequests) {
  using T = TypeParam;
  // G, T, E, C, K
  for (const Requests& shape :
       {Requests{1, 1, 1, 1, 1},
        {2, 7, 3, 2, 1},
        {3, 12, 4, 4, 2},
        {1, 20, 4, 5, 4},
        {2, 9, 1, 30, 3},
        {1, 8, 5, 0, 2},
        {2, 196, 32, 12, 2},
        {2, 300, 7, 90, 3},
        {2, 1024, 5, 400, 2},
        {2, 1025, 5, 500, 2},
        {1, 3000, 9, 100, 2},
        {1, 30, 20, 20, 17},
        {2, 50, 3000, 1, 2},
        {1, 2500, 4096, 2, 1},
        {1, 2000, 1500, 2, 1}}) {
    const auto expert = integers(shape.count(), 1, 0, shape.E - 1);
    this->expect_definition(shape, expert, nullptr);
    this->expect_by_priority(shape, expert, tied<T>(shape.all_tokens(), 3));
  }
}

// The shapes have more tokens than a block sorts, experts with many requests, and buffers with more
// slots than a block sorts.
TYPED_TEST(CudaAssignSlots, LargeGroups) {
  using T = TypeParam;
  for (const Requests& shape :
       {Requests{1, 5000, 8, 1000, 2},
        {2, 4100, 5, 900, 1},
        {1, 4100, 40, 50, 3},
        {1, 9000, 2, 4096, 1},
        {1, 9000, 2, 4097, 1},
        {1, 20000, 3, 300, 1},
        {1, 4500, 700, 3, 1},
        {1, 4500, 4, 0, 2}}) {
    auto expert = integers(shape.count(), 4, -1, shape.E);
    for (size_t i = 0; i < expert.size(); i += 3) expert[i] = 1;
    this->expect_by_priority(shape, expert, tied<T>(shape.all_tokens(), 5, 900));
    const std::vector<T> equal(shape.all_tokens(), T{2});
    this->expect_definition(shape, expert, &equal);
  }
}

TYPED_TEST(CudaAssignSlots, ExtremePrioritiesAndInvalidExperts) {
  using T = TypeParam;
  const std::vector<T> strange{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, -kNaN<T>, T{1e-30}, -T{1e30}};
  const std::vector<int32_t> strange_expert{-1, 5, INT32_MIN, INT32_MAX, 6, 0, 1, 2, 3, 4};
  std::mt19937_64 random(9);
  for (const Requests& shape : {Requests{2, 400, 5, 70, 2}, Requests{1, 4200, 5, 800, 2}}) {
    std::vector<T> priority(shape.all_tokens());
    for (T& value : priority) value = strange[random() % strange.size()];
    std::vector<int32_t> expert(shape.count());
    for (int32_t& e : expert) e = strange_expert[random() % strange_expert.size()];
    this->expect_definition(shape, expert, &priority);
    this->expect_definition(shape, std::vector<int32_t>(expert.size(), 0), &priority);
    this->expect_definition(shape, std::vector<int32_t>(expert.size(), -1), &priority);
    this->expect_definition(shape, std::vector<int32_t>(expert.size(), -1), nullptr);
  }
}

TYPED_TEST(CudaAssignSlots, EmptyShapes) {
  for (const Requests& shape :
       {Requests{0, 3, 4, 2, 2},
        {2, 0, 4, 2, 2},
        {2, 3, 4, 2, 0},
        {2, 3, 0, 2, 2},
        {2, 3, 4, 0, 2}}) {
    const std::vector<int32_t> expert(shape.count(), 0);
    this->expect_definition(shape, expert, nullptr);
    const std::vector<TypeParam> priority(shape.all_tokens(), 1);
    this->expect_definition(shape, expert, &priority);
  }
}

}  // namespace
}  // namespace vmoe
