#include "invert_slots.h"

#include "device.h"

namespace vmoe {
namespace {

void expect_as_on_cpu(const Slots& shape, const std::vector<int32_t>& token) {
  SCOPED_TRACE(
      ::testing::Message() << "G " << shape.G << " E " << shape.E << " C " << shape.C << " T "
                           << shape.tokens);
  std::vector<int32_t> offsets(shape.G * (shape.tokens + 1)), slots(shape.all());
  std::vector<int32_t> filled(shape.G * shape.E);
  cpu::invert_slots(token.data(), offsets.data(), slots.data(), filled.data(), shape, 0, shape.G);
  DeviceArray<int32_t> device_token(token);
  DeviceArray<char> workspace(static_cast<int64_t>(cuda::invert_slots_workspace(shape)));
  for (const bool counted : {true, false}) {
    DeviceArray<int32_t> device_offsets(static_cast<int64_t>(offsets.size()));
    DeviceArray<int32_t> device_slots(static_cast<int64_t>(slots.size()));
    DeviceArray<int32_t> device_filled(static_cast<int64_t>(filled.size()));
    cuda::invert_slots(
        device_token.data(), device_offsets.data(), device_slots.data(),
        counted ? device_filled.data() : nullptr, shape, workspace.data(), nullptr);
    EXPECT_EQ(device_offsets.values(), offsets);
    EXPECT_EQ(device_slots.values(), slots);
    if (counted) {
      EXPECT_EQ(device_filled.values(), filled);
    }
  }
}

// The shapes cover groups in shared memory and groups with one launch per phase. In some shapes an
// expert has fewer slots than a warp has lanes. In other shapes an expert has more slots.
TEST(CudaInvertSlots, SortsSlotsByToken) {
  for (const Slots& shape :
       {Slots{1, 1, 1, 1},
        {3, 5, 17, 1},
        {3, 5, 1, 17},
        {2, 40, 5, 1},
        {4, 196, 4, 50},
        {2, 1100, 3, 200},
        {2, 2000, 100, 300},
        {1, 20000, 4, 1000}}) {
    expect_as_on_cpu(shape, integers(shape.all(), 1, -1, shape.tokens - 1));
    expect_as_on_cpu(shape, integers(shape.all(), 2, -shape.tokens, 2 * shape.tokens));
    expect_as_on_cpu(shape, integers(shape.all(), 3, -40 * shape.tokens, shape.tokens));
  }
}

TEST(CudaInvertSlots, ManySlotsOfOneToken) {
  expect_as_on_cpu({2, 3, 15, 100}, std::vector<int32_t>(3000, 1));
  expect_as_on_cpu({1, 2, 2, 50}, std::vector<int32_t>(100, -1));
  expect_as_on_cpu({1, 4, 1, 3}, {INT32_MIN, INT32_MAX, 4});
}

TEST(CudaInvertSlots, EmptyShapes) {
  expect_as_on_cpu({0, 4, 1, 3}, {});
  expect_as_on_cpu({2, 4, 0, 3}, {});
  expect_as_on_cpu({2, 4, 3, 0}, {});
  expect_as_on_cpu({2, 0, 3, 1}, std::vector<int32_t>(6, 0));
  expect_as_on_cpu({2, 0, 3, 0}, {});
  expect_as_on_cpu({2, 20000, 3, 0}, {});
}

}  // namespace
}  // namespace vmoe
