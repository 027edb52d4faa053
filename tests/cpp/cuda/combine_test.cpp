#include "combine.h"

#include "device.h"
#include "invert_slots.h"

namespace vmoe {
namespace {

struct Shape : Slots {
  int64_t D;
};

template <typename Row>
class CudaCombine : public ::testing::Test {
 public:
  using T = Compute<Row>;

  static void expect_sums_as_on_cpu(
      const Shape& shape, const std::vector<int32_t>& offsets, const std::vector<int32_t>& slots,
      const std::vector<Row>& y, const std::vector<T>& gate) {
    DeviceArray<int32_t> device_offsets(offsets), device_slots(slots);
    DeviceArray<Row> device_y(y);
    DeviceArray<T> device_gate(gate);
    std::vector<Row> out(shape.all_tokens() * shape.D);
    for (const bool gated : {true, false}) {
      cpu::combine(
          y.data(), gated ? gate.data() : nullptr, offsets.data(), slots.data(), out.data(), shape,
          shape.D, 0, shape.all_tokens());
      DeviceArray<Row> device_out(static_cast<int64_t>(out.size()));
      cuda::combine(
          device_y.data(), gated ? device_gate.data() : nullptr, device_offsets.data(),
          device_slots.data(), device_out.data(), shape, shape.D, nullptr);
      expect_same(device_out.values(), out);  // both devices add in the same order, by fma
    }
  }

  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<int32_t>& token, const std::vector<Row>& y,
      const std::vector<T>& gate) {
    SCOPED_TRACE(
        ::testing::Message() << "G " << shape.G << " T " << shape.tokens << " D " << shape.D);
    std::vector<int32_t> offsets(shape.G * (shape.tokens + 1)), slots(shape.all());
    std::vector<int32_t> filled(shape.G * shape.E);
    cpu::invert_slots(token.data(), offsets.data(), slots.data(), filled.data(), shape, 0, shape.G);
    expect_sums_as_on_cpu(shape, offsets, slots, y, gate);
    const auto grad = rows<Row>(shape.all_tokens() * shape.D, 3);
    std::vector<Row> grad_y(y.size());
    std::vector<T> grad_gate(gate.size());
    cpu::combine_backward(
        grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), grad_gate.data(), shape,
        shape.D, 0, shape.all());
    DeviceArray<int32_t> device_token(token);
    DeviceArray<Row> device_y(y), device_grad(grad);
    DeviceArray<Row> device_grad_y(static_cast<int64_t>(grad_y.size()));
    DeviceArray<T> device_gate(gate), device_grad_gate(static_cast<int64_t>(grad_gate.size()));
    cuda::combine_backward(
        device_grad.data(), device_y.data(), device_gate.data(), device_token.data(),
        device_grad_y.data(), device_grad_gate.data(), shape, shape.D, nullptr);
    expect_same(device_grad_y.values(), grad_y);
    expect_near(device_grad_gate.values(), grad_gate, 16 * kRounding<T>);
  }

  static void expect_as_on_cpu(const Shape& shape, const std::vector<int32_t>& token) {
    const auto y = rows<Row>(shape.all() * shape.D, 1);
    expect_as_on_cpu(shape, token, y, uniform<T>(shape.all(), 2));
  }
};
TYPED_TEST_SUITE(CudaCombine, Rows);

// Rows are read in pieces of 16 bytes or entry by entry, depending on D.
TYPED_TEST(CudaCombine, SumsSlotsIntoTokens) {
  for (const int64_t D : {1, 3, 8, 33, 40, 512, 771}) {
    const Shape shape{2, 7, 3, 5, D};
    this->expect_as_on_cpu(shape, integers(shape.all(), 4, -1, shape.tokens - 1));
    this->expect_as_on_cpu(shape, integers(shape.all(), 5, -4, 2 * shape.tokens));
  }
  this->expect_as_on_cpu({1, 1, 1, 1, 1}, {0});
  this->expect_as_on_cpu({1, 2, 4, 8, 16}, integers(32, 6, -1, 1));  // E > T, C > T
  this->expect_as_on_cpu({1, 1, 5, 9, 24}, std::vector<int32_t>(45, 0));
}

// Invalid offsets and slots must not cause reads out of bounds, which a sanitizer reports.
TYPED_TEST(CudaCombine, ListsOutOfRange) {
  using T = Compute<TypeParam>;
  const Shape shape{2, 3, 2, 2, 8};
  const std::vector<int32_t> strange{INT32_MIN, -1, 0, 1, 3, 4, 5, 1000000, INT32_MAX};
  std::mt19937_64 random(3);
  for (int round = 0; round < 30; ++round) {
    std::vector<int32_t> offsets(8), slots(8);
    for (int32_t& value : offsets) value = strange[random() % strange.size()];
    for (int32_t& value : slots) value = strange[random() % strange.size()];
    this->expect_sums_as_on_cpu(
        shape, offsets, slots, rows<TypeParam>(shape.all() * shape.D, 1), uniform<T>(8, 2));
  }
}

TYPED_TEST(CudaCombine, EmptySlotsAreIgnored) {
  using T = Compute<TypeParam>;
  const Shape shape{1, 3, 2, 1, 8};
  auto y = rows<TypeParam>(16, 7);
  for (int i = 8; i < 16; ++i) memset(&y[i], 0xFF, sizeof(y[i]));  // NaN
  this->expect_as_on_cpu(shape, {1, -1}, y, {2, kNaN<T>});
}

TYPED_TEST(CudaCombine, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 5}, {2, 0, 3, 2, 5}, {2, 4, 0, 2, 5}, {2, 4, 3, 0, 5}, {2, 4, 3, 2, 0}}) {
    this->expect_as_on_cpu(shape, std::vector<int32_t>(shape.all(), shape.tokens > 0 ? 0 : -1));
  }
}

}  // namespace
}  // namespace vmoe
