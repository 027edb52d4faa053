#include "assign_slots.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, K, E, C;
};

template <typename T>
class CudaAssignSlots : public ::testing::Test {
 public:
  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<int32_t>& expert, const std::vector<T>* priority) {
    const auto [G, tokens, K, E, C] = shape;
    SCOPED_TRACE(
        ::testing::Message() << "G " << G << " T " << tokens << " K " << K << " E " << E << " C "
                             << C << (priority ? " with priority" : ""));
    std::vector<int32_t> slot(G * tokens * K), source(G * E * C);
    cpu::assign_slots(
        expert.data(), priority ? priority->data() : nullptr, slot.data(), source.data(), tokens, K,
        E, C, 0, G);
    DeviceArray<int32_t> device_expert(expert), device_slot(G * tokens * K),
        device_source(G * E * C);
    DeviceArray<T> device_priority(priority ? *priority : std::vector<T>{});
    DeviceArray<char> workspace(
        static_cast<int64_t>(
            cuda::assign_slots_workspace<T>(priority != nullptr, G, tokens, K, E, C)));
    cuda::assign_slots(
        device_expert.data(), priority ? device_priority.data() : nullptr, device_slot.data(),
        device_source.data(), G, tokens, K, E, C, workspace.data(), nullptr);
    EXPECT_EQ(device_slot.values(), slot);
    EXPECT_EQ(device_source.values(), source);
  }

  // With priorities that tie, and with distinct ones.
  static void expect_by_priority(
      const Shape& shape, const std::vector<int32_t>& expert, const std::vector<T>& ties) {
    expect_as_on_cpu(shape, expert, &ties);
    const auto distinct = uniform<T>(shape.G * shape.T, 2);
    expect_as_on_cpu(shape, expert, &distinct);
  }
};
TYPED_TEST_SUITE(CudaAssignSlots, Floats);

// One chunk and several, warps without requests, buffers too small and too large.
TYPED_TEST(CudaAssignSlots, RanksRequests) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1, 1, 1},
        {2, 7, 1, 3, 2},
        {3, 12, 2, 4, 4},
        {1, 20, 4, 4, 5},
        {2, 9, 3, 1, 30},
        {1, 8, 2, 5, 0},
        {2, 196, 2, 32, 12},
        {2, 300, 3, 7, 90},
        {2, 1024, 2, 5, 400},
        {2, 1025, 2, 5, 500},
        {1, 3000, 2, 9, 100},
        {1, 30, 17, 20, 20},
        {2, 50, 2, 3000, 1},
        {1, 2500, 1, 4096, 2},
        {1, 2000, 1, 1500, 2}}) {
    const auto expert = integers(shape.G * shape.T * shape.K, 1, 0, shape.E - 1);
    this->expect_as_on_cpu(shape, expert, nullptr);
    this->expect_by_priority(shape, expert, tied<T>(shape.G * shape.T, 3));
  }
}

// More tokens than a block sorts, experts that many of them ask for, buffers larger than a block's.
TYPED_TEST(CudaAssignSlots, LargeGroups) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 5000, 2, 8, 1000},
        {2, 4100, 1, 5, 900},
        {1, 4100, 3, 40, 50},
        {1, 9000, 1, 2, 4096},
        {1, 9000, 1, 2, 4097},
        {1, 20000, 1, 3, 300},
        {1, 4500, 1, 700, 3},
        {1, 4500, 2, 4, 0}}) {
    auto expert = integers(shape.G * shape.T * shape.K, 4, -1, shape.E);
    for (size_t i = 0; i < expert.size(); i += 3) expert[i] = 1;
    this->expect_by_priority(shape, expert, tied<T>(shape.G * shape.T, 5, 900));
    const std::vector<T> equal(shape.G * shape.T, T{2});
    this->expect_as_on_cpu(shape, expert, &equal);
  }
}

TYPED_TEST(CudaAssignSlots, StrangePriorityAndExperts) {
  using T = TypeParam;
  const std::vector<T> strange{0, -T{0}, -kInf<T>, kInf<T>, kNaN<T>, -kNaN<T>, T{1e-30}, -T{1e30}};
  const std::vector<int32_t> strange_expert{-1, 5, INT32_MIN, INT32_MAX, 6, 0, 1, 2, 3, 4};
  std::mt19937_64 random(9);
  for (const Shape& shape : {Shape{2, 400, 2, 5, 70}, Shape{1, 4200, 2, 5, 800}}) {
    std::vector<T> priority(shape.G * shape.T);
    for (T& value : priority) value = strange[random() % strange.size()];
    std::vector<int32_t> expert(shape.G * shape.T * shape.K);
    for (int32_t& e : expert) e = strange_expert[random() % strange_expert.size()];
    this->expect_as_on_cpu(shape, expert, &priority);
    this->expect_as_on_cpu(shape, std::vector<int32_t>(expert.size(), 0), &priority);
    this->expect_as_on_cpu(shape, std::vector<int32_t>(expert.size(), -1), &priority);
    this->expect_as_on_cpu(shape, std::vector<int32_t>(expert.size(), -1), nullptr);
  }
}

TYPED_TEST(CudaAssignSlots, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 3, 2, 4, 2}, {2, 0, 2, 4, 2}, {2, 3, 0, 4, 2}, {2, 3, 2, 0, 2}, {2, 3, 2, 4, 0}}) {
    const std::vector<int32_t> expert(shape.G * shape.T * shape.K, 0);
    this->expect_as_on_cpu(shape, expert, nullptr);
    const std::vector<TypeParam> priority(shape.G * shape.T, 1);
    this->expect_as_on_cpu(shape, expert, &priority);
  }
}

}  // namespace
}  // namespace vmoe
