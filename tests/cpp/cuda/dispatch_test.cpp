#include "dispatch.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E, C, row_bytes;
};

void expect_as_on_cpu(const Shape& shape, const std::vector<int32_t>& token) {
  const auto [G, tokens, E, C, row_bytes] = shape;
  SCOPED_TRACE(::testing::Message() << "row of " << row_bytes << " bytes");
  std::vector<char> x(G * tokens * row_bytes), out(E * G * C * row_bytes);
  std::mt19937_64 random(1);
  for (char& byte : x) byte = static_cast<char>(random());
  cpu::dispatch(x.data(), token.data(), out.data(), G, tokens, E, C, row_bytes, 0, E * G * C);
  DeviceArray<char> device_x(x), device_out(static_cast<int64_t>(out.size()));
  DeviceArray<int32_t> device_token(token);
  cuda::dispatch(
      device_x.data(), device_token.data(), device_out.data(), G, tokens, E, C, row_bytes, nullptr);
  expect_same(device_out.values(), out);
}

// Rows that are copied 16, 4, 2 and 1 bytes at a time.
TEST(CudaDispatch, CopiesRows) {
  for (const int64_t row_bytes : {1, 2, 3, 4, 6, 8, 16, 20, 32, 400, 1536, 2064}) {
    const Shape shape{2, 7, 3, 4, row_bytes};
    expect_as_on_cpu(shape, integers(24, 2, -1, 6));
    expect_as_on_cpu(shape, integers(24, 3, -5, 12));  // many outside [0, T)
  }
  expect_as_on_cpu({1, 1, 1, 1, 4}, {0});
  expect_as_on_cpu({1, 1, 4096, 1, 2}, integers(4096, 5, -1, 0));
  expect_as_on_cpu({1, 3, 6, 5, 64}, integers(30, 4, -1, 2));  // E > T, C > T
}

TEST(CudaDispatch, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 8}, {2, 0, 3, 2, 8}, {2, 4, 0, 2, 8}, {2, 4, 3, 0, 8}, {2, 4, 3, 2, 0}}) {
    expect_as_on_cpu(shape, std::vector<int32_t>(shape.G * shape.E * shape.C, 0));
  }
}

}  // namespace
}  // namespace vmoe
