#include "combine.h"

#include "device.h"
#include "invert_slots.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E, C, D;
  int64_t slots() const { return G * E * C; }
};

template <typename Row>
class CudaCombine : public ::testing::Test {
 public:
  using T = Compute<Row>;

  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<int32_t>& token, const std::vector<Row>& y,
      const std::vector<T>& gate) {
    const auto [G, tokens, E, C, D] = shape;
    SCOPED_TRACE(::testing::Message() << "G " << G << " T " << tokens << " D " << D);
    std::vector<int32_t> offsets(G * (tokens + 1)), slots(shape.slots());
    cpu::invert_slots(token.data(), offsets.data(), slots.data(), E * C, tokens, 0, G);
    DeviceArray<int32_t> device_token(token), device_offsets(offsets), device_slots(slots);
    DeviceArray<Row> device_y(y);
    DeviceArray<T> device_gate(gate);
    std::vector<Row> out(G * tokens * D);
    for (const bool gated : {true, false}) {
      cpu::combine(
          y.data(), gated ? gate.data() : nullptr, offsets.data(), slots.data(), out.data(), G,
          tokens, E, C, D, 0, G * tokens);
      DeviceArray<Row> device_out(static_cast<int64_t>(out.size()));
      cuda::combine(
          device_y.data(), gated ? device_gate.data() : nullptr, device_offsets.data(),
          device_slots.data(), device_out.data(), G, tokens, E, C, D, nullptr);
      expect_same(device_out.values(), out);  // the same order, the same fma
    }
    const auto grad = rows<Row>(G * tokens * D, 3);
    std::vector<Row> grad_y(y.size());
    std::vector<T> grad_gate(gate.size());
    cpu::combine_backward(
        grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), grad_gate.data(), G,
        tokens, E, C, D, 0, shape.slots());
    DeviceArray<Row> device_grad(grad), device_grad_y(static_cast<int64_t>(grad_y.size()));
    DeviceArray<T> device_grad_gate(static_cast<int64_t>(grad_gate.size()));
    cuda::combine_backward(
        device_grad.data(), device_y.data(), device_gate.data(), device_token.data(),
        device_grad_y.data(), device_grad_gate.data(), G, tokens, E, C, D, nullptr);
    expect_same(device_grad_y.values(), grad_y);
    expect_near(device_grad_gate.values(), grad_gate, 16 * kRounding<T>);
  }

  static void expect_as_on_cpu(const Shape& shape, const std::vector<int32_t>& token) {
    const auto y = rows<Row>(shape.slots() * shape.D, 1);
    expect_as_on_cpu(shape, token, y, uniform<T>(shape.slots(), 2));
  }
};
TYPED_TEST_SUITE(CudaCombine, Rows);

// Rows in pieces of 16 bytes and entry by entry.
TYPED_TEST(CudaCombine, SumsSlotsIntoTokens) {
  for (const int64_t D : {1, 3, 8, 33, 40, 512, 771}) {
    const Shape shape{2, 7, 3, 5, D};
    this->expect_as_on_cpu(shape, integers(shape.slots(), 4, -1, shape.T - 1));
    this->expect_as_on_cpu(shape, integers(shape.slots(), 5, -4, 2 * shape.T));
  }
  this->expect_as_on_cpu({1, 1, 1, 1, 1}, {0});
  this->expect_as_on_cpu({1, 2, 4, 8, 16}, integers(32, 6, -1, 1));  // E > T, C > T
  this->expect_as_on_cpu({1, 1, 5, 9, 24}, std::vector<int32_t>(45, 0));
}

TYPED_TEST(CudaCombine, EmptySlotsSayNothing) {
  using T = Compute<TypeParam>;
  const Shape shape{1, 3, 2, 1, 8};
  auto y = rows<TypeParam>(16, 7);
  for (int i = 8; i < 16; ++i) memset(&y[i], 0xFF, sizeof(y[i]));  // NaN
  this->expect_as_on_cpu(shape, {1, -1}, y, {2, kNaN<T>});
}

TYPED_TEST(CudaCombine, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 5}, {2, 0, 3, 2, 5}, {2, 4, 0, 2, 5}, {2, 4, 3, 0, 5}, {2, 4, 3, 2, 0}}) {
    this->expect_as_on_cpu(shape, std::vector<int32_t>(shape.slots(), shape.T > 0 ? 0 : -1));
  }
}

}  // namespace
}  // namespace vmoe
