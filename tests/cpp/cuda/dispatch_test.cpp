#include "dispatch.h"

#include "device.h"

namespace vmoe {
namespace {

void expect_as_on_cpu(const Slots& shape, int64_t row_bytes, const std::vector<int32_t>& token) {
  SCOPED_TRACE(::testing::Message() << "row of " << row_bytes << " bytes");
  std::vector<char> x(shape.all_tokens() * row_bytes), out(shape.all() * row_bytes);
  std::mt19937_64 random(1);
  for (char& byte : x) byte = static_cast<char>(random());
  cpu::dispatch(x.data(), token.data(), out.data(), shape, row_bytes, 0, shape.all());
  DeviceArray<char> device_x(x), device_out(static_cast<int64_t>(out.size()));
  DeviceArray<int32_t> device_token(token);
  cuda::dispatch(
      device_x.data(), device_token.data(), device_out.data(), shape, row_bytes, nullptr);
  expect_same(device_out.values(), out);
}

// Rows are copied 16, 4, 2 or 1 bytes at a time, depending on their size.
TEST(CudaDispatch, CopiesRows) {
  for (const int64_t row_bytes : {1, 2, 3, 4, 6, 8, 16, 20, 32, 400, 1536, 2064}) {
    const Slots shape{2, 7, 3, 4};
    expect_as_on_cpu(shape, row_bytes, integers(24, 2, -1, 6));
    expect_as_on_cpu(shape, row_bytes, integers(24, 3, -5, 12));  // many outside [0, T)
  }
  expect_as_on_cpu({1, 1, 1, 1}, 4, {0});
  expect_as_on_cpu({1, 1, 4096, 1}, 2, integers(4096, 5, -1, 0));
  expect_as_on_cpu({1, 3, 6, 5}, 64, integers(30, 4, -1, 2));  // E > T, C > T
}

TEST(CudaDispatch, EmptyShapes) {
  for (const Slots& shape : {Slots{0, 4, 3, 2}, {2, 0, 3, 2}, {2, 4, 0, 2}, {2, 4, 3, 0}}) {
    expect_as_on_cpu(shape, 8, std::vector<int32_t>(shape.all(), 0));
  }
  expect_as_on_cpu({2, 4, 3, 2}, 0, std::vector<int32_t>(12, 0));
}

}  // namespace
}  // namespace vmoe
