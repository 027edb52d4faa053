#include "combine.h"

#include "simd_probe.h"
#include "testing.h"

namespace vmoe {
namespace {

struct Shape : Slots {
  int64_t D;
};

// The index of the row of y for group g, slot s = e * C + c.
int64_t row(const Shape& shape, int64_t g, int64_t s) {
  return ((s / shape.C) * shape.G + g) * shape.C + s % shape.C;
}

struct Lists {
  std::vector<int32_t> offsets, slots;
};

Lists invert(const Shape& shape, const std::vector<int32_t>& token) {
  Lists lists;
  const int64_t S = shape.E * shape.C;
  for (int64_t g = 0; g < shape.G; ++g) {
    const size_t begin = lists.slots.size();
    for (int64_t t = 0; t <= shape.tokens; ++t) {
      lists.offsets.push_back(static_cast<int32_t>(lists.slots.size() - begin));
      for (int64_t s = 0; s < S && t < shape.tokens; ++s) {
        if (token[g * S + s] == t) lists.slots.push_back(static_cast<int32_t>(s));
      }
    }
    lists.slots.resize(begin + S, -1);
  }
  return lists;
}

template <typename T>
std::vector<T> combine(
    const Shape& shape, const std::vector<T>& y, const std::vector<T>* gate,
    const std::vector<int32_t>& token) {
  const Lists lists = invert(shape, token);
  Guarded<T> out(shape.G * shape.tokens * shape.D);
  cpu::combine(
      y.data(), gate ? gate->data() : nullptr, lists.offsets.data(), lists.slots.data(), out.data(),
      shape, shape.D, 0, shape.all_tokens());
  EXPECT_TRUE(out.fences_stand());
  return out.values();
}

template <typename T>
struct Gradients {
  std::vector<T> y, gate;
};

template <typename T>
Gradients<T> combine_backward(
    const Shape& shape, const std::vector<T>& grad, const std::vector<T>& y,
    const std::vector<T>& gate, const std::vector<int32_t>& token) {
  Guarded<T> grad_y(shape.all() * shape.D), grad_gate(shape.all());
  cpu::combine_backward(
      grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), grad_gate.data(), shape,
      shape.D, 0, shape.all());
  EXPECT_TRUE(grad_y.fences_stand() && grad_gate.fences_stand());
  return {grad_y.values(), grad_gate.values()};
}

template <typename T>
class Combine : public ::testing::Test {
 public:
  // Expects the sums by definition: adds every slot to its token, in float64.
  static void expect_sums(const Shape& shape, const std::vector<int32_t>& token) {
    const auto y = uniform<T>(shape.all() * shape.D, 1);
    const auto gate = uniform<T>(shape.all(), 2);
    const auto grad = uniform<T>(shape.G * shape.tokens * shape.D, 3);
    std::vector<double> out(grad.size()), plain(grad.size()), grad_y(y.size()),
        grad_gate(gate.size());
    const int64_t S = shape.E * shape.C;
    for (int64_t g = 0; g < shape.G; ++g) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t t = token[g * S + s];
        if (t < 0 || t >= shape.tokens) continue;
        for (int64_t d = 0; d < shape.D; ++d) {
          const int64_t from = row(shape, g, s) * shape.D + d,
                        to = (g * shape.tokens + t) * shape.D + d;
          const double weight = gate[g * S + s];
          out[to] += weight * y[from];
          plain[to] += y[from];
          grad_y[from] = weight * grad[to];
          grad_gate[g * S + s] += static_cast<double>(grad[to]) * y[from];
        }
      }
    }
    const double tolerance = 4 * kRounding<T>;
    expect_near(combine(shape, y, &gate, token), out, tolerance);
    expect_near(combine<T>(shape, y, nullptr, token), plain, tolerance);
    const auto gradients = combine_backward(shape, grad, y, gate, token);
    expect_near(gradients.y, grad_y, tolerance);
    expect_near(gradients.gate, grad_gate, tolerance);
  }
};
TYPED_TEST_SUITE(Combine, Floats);

TYPED_TEST(Combine, SumsSlotsIntoTokens) {
  for (const Shape& shape :
       {Shape{1, 1, 1, 1, 1},
        {3, 5, 4, 2, 3},
        {2, 7, 3, 5, 17},
        {1, 2, 4, 8, 5},
        {1, 3, 2, 2, 63},  // rows end with three whole vectors and a part, on every ISA level
        {4, 30, 2, 3, 2}}) {
    this->expect_sums(shape, integers(shape.all(), 4, -1, shape.tokens - 1));
  }
}

TYPED_TEST(Combine, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 5}, {2, 0, 3, 2, 5}, {2, 4, 0, 2, 5}, {2, 4, 3, 0, 5}, {2, 4, 3, 2, 0}}) {
    this->expect_sums(shape, std::vector<int32_t>(shape.all(), shape.tokens > 0 ? 0 : -1));
  }
}

TYPED_TEST(Combine, TokenOutOfRangeIsAnEmptySlot) {
  const Shape shape{2, 4, 3, 2, 3};
  this->expect_sums(shape, {4, 0, -1, 3, INT32_MAX, INT32_MIN, 1, 5, 2, -2, 3, 8});
}

// Offsets are clamped to [0, S]. Slots outside [0, S) are skipped.
TYPED_TEST(Combine, ListsOutOfRange) {
  using T = TypeParam;
  const Shape shape{1, 3, 2, 2, 1};
  const std::vector<T> y{1, 2, 4, 8}, gate{1, 2, 3, 4};
  const std::vector<int32_t> offsets{INT32_MIN, 2, 1, INT32_MAX}, slots{INT32_MAX, 3, -1, 2};
  Guarded<T> out(3);
  cpu::combine(y.data(), gate.data(), offsets.data(), slots.data(), out.data(), shape, 1, 0, 3);
  EXPECT_TRUE(out.fences_stand());
  EXPECT_EQ(out.values(), (std::vector<T>{32, 0, 44}));
  // Random invalid lists: a sanitizer reports reads out of bounds.
  const std::vector<int32_t> strange{INT32_MIN, -1, 0, 1, 3, 4, 5, 1000000, INT32_MAX};
  std::mt19937_64 random(3);
  for (int round = 0; round < 100; ++round) {
    std::vector<int32_t> any_offsets(4), any_slots(4);
    for (int32_t& value : any_offsets) value = strange[random() % strange.size()];
    for (int32_t& value : any_slots) value = strange[random() % strange.size()];
    cpu::combine(
        y.data(), gate.data(), any_offsets.data(), any_slots.data(), out.data(), shape, 1, 0, 3);
    EXPECT_TRUE(out.fences_stand());
  }
}

TYPED_TEST(Combine, TokenWithoutSlotGetsZeros) {
  using T = TypeParam;
  const Shape shape{1, 3, 2, 1, 2};
  // The entries of an empty slot must not change the result, not even if the entries are NaN.
  const std::vector<T> y{1, 2, kNaN<T>, kInf<T>}, gate{2, kNaN<T>};
  EXPECT_EQ(combine(shape, y, &gate, {1, -1}), (std::vector<T>{0, 0, 2, 4, 0, 0}));
  const auto gradients = combine_backward(shape, {5, 6, 7, 8, 9, 10}, y, gate, {1, -1});
  EXPECT_EQ(gradients.y, (std::vector<T>{14, 16, 0, 0}));
  EXPECT_EQ(gradients.gate, (std::vector<T>{23, 0}));
}

TYPED_TEST(Combine, AddsInAscendingOrderOfSlots) {
  using T = TypeParam;
  const Shape shape{1, 1, 2, 2, 1};
  const T big = 2 / std::numeric_limits<T>::epsilon();  // big + 1 == big
  const std::vector<int32_t> token(4, 0);
  EXPECT_EQ(combine<T>(shape, {big, 1, -big, 1}, nullptr, token), (std::vector<T>{1}));
  EXPECT_EQ(combine<T>(shape, {1, big, -big, 1}, nullptr, token), (std::vector<T>{1}));
  EXPECT_EQ(combine<T>(shape, {big, -big, 1, 1}, nullptr, token), (std::vector<T>{2}));
}

TYPED_TEST(Combine, WithoutGateAllGatesAreOne) {
  using T = TypeParam;
  const Shape shape{2, 4, 3, 2, 5};
  const auto y = uniform<T>(shape.all() * shape.D, 5);
  const auto token = integers(shape.all(), 6, -1, shape.tokens - 1);
  const std::vector<T> ones(shape.all(), 1);
  EXPECT_EQ(combine<T>(shape, y, nullptr, token), combine(shape, y, &ones, token));
}

TYPED_TEST(Combine, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const Shape shape{3, 5, 4, 2, 3};
  const int64_t D = shape.D, S = shape.of_group();
  const auto y = uniform<T>(shape.all() * D, 7), gate = uniform<T>(shape.all(), 8);
  const auto grad = uniform<T>(shape.all_tokens() * D, 9);
  const auto token = integers(shape.all(), 10, -1, shape.tokens);
  const Lists lists = invert(shape, token);
  expect_pieces<T>(shape.all_tokens(), D, [&](int64_t begin, int64_t end, T* out) {
    cpu::combine(
        y.data(), gate.data(), lists.offsets.data(), lists.slots.data(), out, shape, D, begin, end);
  });
  std::vector<T> grad_y(y.size()), grad_gate(gate.size());
  expect_pieces<T>(shape.all(), D, [&](int64_t begin, int64_t end, T* out) {
    cpu::combine_backward(
        grad.data(), y.data(), gate.data(), token.data(), out, grad_gate.data(), shape, D, begin,
        end);
  });
  // The gate's gradient is stored by slot, not by row.
  expect_pieces<T>(
      shape.all(), shape.all(),
      [&](int64_t begin, int64_t end, T* out) {
        cpu::combine_backward(
            grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), out, shape, D, begin,
            end);
      },
      [&](int64_t i) { return row(shape, i / S, i % S); });
}

TEST(CombineBackward, IsTheGradient) {
  const Shape shape{2, 4, 3, 2, 3};
  const auto y = uniform<double>(shape.all() * shape.D, 11);
  const auto gate = uniform<double>(shape.all(), 12);
  const auto grad = uniform<double>(shape.G * shape.tokens * shape.D, 13);
  const auto token = integers(shape.all(), 14, -1, shape.tokens - 1);
  const auto gradients = combine_backward(shape, grad, y, gate, token);
  expect_gradient(gradients.y, y, [&](const std::vector<double>& moved) {
    return inner(grad, combine(shape, moved, &gate, token));
  });
  expect_gradient(gradients.gate, gate, [&](const std::vector<double>& moved) {
    return inner(grad, combine(shape, y, &moved, token));
  });
}

template <typename Half>
class CombineHalves : public ::testing::Test {
 public:
  static std::vector<Half> narrow(const std::vector<float>& x) {
    std::vector<Half> out(x.size());
    cpu::narrow_each(x.data(), out.data(), static_cast<int64_t>(x.size()));
    return out;
  }
  static std::vector<float> widen(const std::vector<Half>& x) {
    std::vector<float> out(x.size());
    cpu::widen_each(x.data(), out.data(), static_cast<int64_t>(x.size()));
    return out;
  }
};
using HalfTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(CombineHalves, HalfTypes);

// Expects the bits of the float kernel's result for the widened rows, rounded once.
TYPED_TEST(CombineHalves, ComputesInFloat) {
  using Half = TypeParam;
  for (const int64_t D : {1, 7, 16, 64, 100, 131}) {
    const Shape shape{2, 5, 3, 4, D};
    const auto y = this->narrow(uniform<float>(shape.all() * D, 15));
    const auto grad = this->narrow(uniform<float>(shape.all_tokens() * D, 16));
    const auto gate = uniform<float>(shape.all(), 17);
    const auto token = integers(shape.all(), 18, -1, shape.tokens);
    const Lists lists = invert(shape, token);

    Guarded<Half> out(shape.all_tokens() * D), grad_y(shape.all() * D);
    Guarded<float> grad_gate(shape.all());
    cpu::combine(
        y.data(), gate.data(), lists.offsets.data(), lists.slots.data(), out.data(), shape, D, 0,
        shape.all_tokens());
    cpu::combine_backward(
        grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), grad_gate.data(), shape, D,
        0, shape.all());
    EXPECT_TRUE(out.fences_stand() && grad_y.fences_stand() && grad_gate.fences_stand());

    const auto wide_y = this->widen(y), wide_grad = this->widen(grad);
    const auto rounded = [&](const std::vector<float>& x) { return this->widen(this->narrow(x)); };
    EXPECT_EQ(this->widen(out.values()), rounded(combine(shape, wide_y, &gate, token)));
    const auto gradients = combine_backward(shape, wide_grad, wide_y, gate, token);
    EXPECT_EQ(this->widen(grad_y.values()), rounded(gradients.y));
    EXPECT_EQ(grad_gate.values(), gradients.gate);
  }
}

// Outputs that are large enough for streaming stores.
TYPED_TEST(Combine, LargeOutputs) {
  using T = TypeParam;
  const int64_t D = 4096 / sizeof(T), tokens = 8200;
  const auto aligned = [](std::vector<T>& memory) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  };
  const std::vector<T> y = uniform<T>(tokens * D, 19);
  const std::vector<T> gate = uniform<T>(tokens, 20);
  std::vector<T> a(tokens * D + 64), b(tokens * D + 64), dot(tokens);
  std::vector<int32_t> token(tokens), offsets(tokens + 1), slots(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    token[t] = slots[t] = static_cast<int32_t>(tokens - 1 - t);
    offsets[t] = static_cast<int32_t>(t);
  }
  offsets[tokens] = offsets[tokens - 1];  // the last token has no slot
  token[0] = -1;
  const Slots shape{1, tokens, 1, tokens};
  T* out = aligned(a);
  T* grad_y = aligned(b);
  cpu::combine(y.data(), gate.data(), offsets.data(), slots.data(), out, shape, D, 0, tokens);
  cpu::combine_backward(
      static_cast<const T*>(out), y.data(), gate.data(), token.data(), grad_y, dot.data(), shape, D,
      0, tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t s = slots[t];
    for (int64_t d = 0; d < D; d += 97) {
      const T wanted = t == tokens - 1 ? 0 : gate[s] * y[s * D + d];
      ASSERT_EQ(out[t * D + d], wanted);
      ASSERT_EQ(grad_y[s * D + d], t == tokens - 1 ? 0 : gate[s] * wanted);
    }
  }
}

}  // namespace
}  // namespace vmoe
