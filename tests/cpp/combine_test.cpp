#include "combine.h"

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E, C, D;
  int64_t slots() const { return G * E * C; }
};

// Where y of group g, slot s = e * C + c begins.
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
    for (int64_t t = 0; t <= shape.T; ++t) {
      lists.offsets.push_back(static_cast<int32_t>(lists.slots.size() - begin));
      for (int64_t s = 0; s < S && t < shape.T; ++s) {
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
  Guarded<T> out(shape.G * shape.T * shape.D);
  cpu::combine(
      y.data(), gate ? gate->data() : nullptr, lists.offsets.data(), lists.slots.data(), out.data(),
      shape.G, shape.T, shape.E, shape.C, shape.D, 0, shape.G * shape.T);
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
  Guarded<T> grad_y(shape.slots() * shape.D), grad_gate(shape.slots());
  cpu::combine_backward(
      grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), grad_gate.data(), shape.G,
      shape.T, shape.E, shape.C, shape.D, 0, shape.slots());
  EXPECT_TRUE(grad_y.fences_stand() && grad_gate.fences_stand());
  return {grad_y.values(), grad_gate.values()};
}

template <typename T>
class Combine : public ::testing::Test {
 public:
  // By definition: every slot added to its token, in float64.
  static void expect_sums(const Shape& shape, const std::vector<int32_t>& token) {
    const auto y = uniform<T>(shape.slots() * shape.D, 1);
    const auto gate = uniform<T>(shape.slots(), 2);
    const auto grad = uniform<T>(shape.G * shape.T * shape.D, 3);
    std::vector<double> out(grad.size()), plain(grad.size()), grad_y(y.size()),
        grad_gate(gate.size());
    const int64_t S = shape.E * shape.C;
    for (int64_t g = 0; g < shape.G; ++g) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t t = token[g * S + s];
        if (t < 0 || t >= shape.T) continue;
        for (int64_t d = 0; d < shape.D; ++d) {
          const int64_t from = row(shape, g, s) * shape.D + d, to = (g * shape.T + t) * shape.D + d;
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
        {4, 30, 2, 3, 2}}) {
    this->expect_sums(shape, integers(shape.slots(), 4, -1, shape.T - 1));
  }
}

TYPED_TEST(Combine, EmptyShapes) {
  for (const Shape& shape :
       {Shape{0, 4, 3, 2, 5}, {2, 0, 3, 2, 5}, {2, 4, 0, 2, 5}, {2, 4, 3, 0, 5}, {2, 4, 3, 2, 0}}) {
    this->expect_sums(shape, std::vector<int32_t>(shape.slots(), shape.T > 0 ? 0 : -1));
  }
}

TYPED_TEST(Combine, TokenOutOfRangeIsAnEmptySlot) {
  const Shape shape{2, 4, 3, 2, 3};
  this->expect_sums(shape, {4, 0, -1, 3, INT32_MAX, INT32_MIN, 1, 5, 2, -2, 3, 8});
}

TYPED_TEST(Combine, TokenWithoutSlotGetsZeros) {
  using T = TypeParam;
  const Shape shape{1, 3, 2, 1, 2};
  // What lies in an empty slot must not come through, not even NaN.
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

TYPED_TEST(Combine, NoGateIsAGateOfOnes) {
  using T = TypeParam;
  const Shape shape{2, 4, 3, 2, 5};
  const auto y = uniform<T>(shape.slots() * shape.D, 5);
  const auto token = integers(shape.slots(), 6, -1, shape.T - 1);
  const std::vector<T> ones(shape.slots(), 1);
  EXPECT_EQ(combine<T>(shape, y, nullptr, token), combine(shape, y, &ones, token));
}

TYPED_TEST(Combine, PiecesMakeTheWhole) {
  using T = TypeParam;
  const Shape shape{3, 5, 4, 2, 3};
  const auto [G, tokens, E, C, D] = shape;
  const auto y = uniform<T>(shape.slots() * D, 7), gate = uniform<T>(shape.slots(), 8);
  const auto grad = uniform<T>(G * tokens * D, 9);
  const auto token = integers(shape.slots(), 10, -1, tokens);
  const Lists lists = invert(shape, token);
  expect_pieces<T>(
      G * tokens, D,
      [&, G = G, tokens = tokens, E = E, C = C, D = D](int64_t begin, int64_t end, T* out) {
        cpu::combine(
            y.data(), gate.data(), lists.offsets.data(), lists.slots.data(), out, G, tokens, E, C,
            D, begin, end);
      });
  std::vector<T> grad_y(y.size()), grad_gate(gate.size());
  expect_pieces<T>(
      E * G * C, D,
      [&, G = G, tokens = tokens, E = E, C = C, D = D](int64_t begin, int64_t end, T* out) {
        cpu::combine_backward(
            grad.data(), y.data(), gate.data(), token.data(), out, grad_gate.data(), G, tokens, E,
            C, D, begin, end);
      });
  // The gate's gradient lies by slot, not by row.
  expect_pieces<T>(
      shape.slots(), shape.slots(),
      [&, G = G, tokens = tokens, E = E, C = C, D = D](int64_t begin, int64_t end, T* out) {
        cpu::combine_backward(
            grad.data(), y.data(), gate.data(), token.data(), grad_y.data(), out, G, tokens, E, C,
            D, begin, end);
      },
      [&, E = E, C = C](int64_t i) { return row(shape, i / (E * C), i % (E * C)); });
}

TEST(CombineBackward, IsTheGradient) {
  const Shape shape{2, 4, 3, 2, 3};
  const auto y = uniform<double>(shape.slots() * shape.D, 11);
  const auto gate = uniform<double>(shape.slots(), 12);
  const auto grad = uniform<double>(shape.G * shape.T * shape.D, 13);
  const auto token = integers(shape.slots(), 14, -1, shape.T - 1);
  const auto gradients = combine_backward(shape, grad, y, gate, token);
  expect_gradient(gradients.y, y, [&](const std::vector<double>& moved) {
    return inner(grad, combine(shape, moved, &gate, token));
  });
  expect_gradient(gradients.gate, gate, [&](const std::vector<double>& moved) {
    return inner(grad, combine(shape, y, &moved, token));
  });
}

}  // namespace
}  // namespace vmoe
