#include "invert_slots.h"

#include <array>

#include "device.h"

namespace vmoe {
namespace {

void expect_as_on_cpu(int64_t G, int64_t S, int64_t tokens, const std::vector<int32_t>& token) {
  SCOPED_TRACE(::testing::Message() << "G " << G << " S " << S << " T " << tokens);
  std::vector<int32_t> offsets(G * (tokens + 1)), slots(G * S);
  cpu::invert_slots(token.data(), offsets.data(), slots.data(), S, tokens, 0, G);
  DeviceArray<int32_t> device_token(token), device_offsets(G * (tokens + 1)), device_slots(G * S);
  DeviceArray<char> workspace(static_cast<int64_t>(cuda::invert_slots_workspace(G, S, tokens)));
  cuda::invert_slots(
      device_token.data(), device_offsets.data(), device_slots.data(), G, S, tokens,
      workspace.data(), nullptr);
  EXPECT_EQ(device_offsets.values(), offsets);
  EXPECT_EQ(device_slots.values(), slots);
}

// In shared memory, and in a launch a phase.
TEST(CudaInvertSlots, SortsSlotsByToken) {
  for (const auto& [G, S, tokens] :
       {std::array<int64_t, 3>{1, 1, 1},
        {3, 17, 5},
        {2, 5, 40},
        {4, 200, 196},
        {2, 600, 1100},
        {2, 30000, 2000},
        {1, 4000, 20000}}) {
    expect_as_on_cpu(G, S, tokens, integers(G * S, 1, -1, tokens - 1));
    expect_as_on_cpu(G, S, tokens, integers(G * S, 2, -tokens, 2 * tokens));
  }
}

TEST(CudaInvertSlots, ManySlotsOfOneToken) {
  expect_as_on_cpu(2, 1500, 3, std::vector<int32_t>(3000, 1));
  expect_as_on_cpu(1, 100, 2, std::vector<int32_t>(100, -1));
  expect_as_on_cpu(1, 3, 4, {INT32_MIN, INT32_MAX, 4});
}

TEST(CudaInvertSlots, EmptyShapes) {
  expect_as_on_cpu(0, 3, 4, {});
  expect_as_on_cpu(2, 0, 4, {});
  expect_as_on_cpu(2, 3, 0, std::vector<int32_t>(6, 0));
  expect_as_on_cpu(2, 0, 0, {});
  expect_as_on_cpu(2, 0, 20000, {});
}

}  // namespace
}  // namespace vmoe
