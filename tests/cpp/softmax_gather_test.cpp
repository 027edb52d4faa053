#include "softmax_gather.h"

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, tokens, E, K;
  bool by_expert;

  int64_t all() const { return G * tokens; }
  int64_t rows() const { return G * (by_expert ? E : tokens); }
  int64_t places() const { return by_expert ? tokens : E; }

  // The position in [G, T, E] of the gate that indices[i] = `index` chooses, or -1 if it is
  // invalid.
  int64_t place(int64_t i, int32_t index) const {
    if (index < 0 || index >= places()) return -1;
    const int64_t row = i / K;
    return by_expert ? (row / E * tokens + index) * E + row % E : row * E + index;
  }
};

template <typename T>
struct Gathered {
  std::vector<T> values, high, scale;
};

template <typename T>
Gathered<T> gather(
    const Shape& shape, const std::vector<T>& logits, const std::vector<int32_t>& indices) {
  Guarded<T> values(indices.size()), high(shape.all()), scale(shape.all());
  cpu::softmax_norms(logits.data(), high.data(), scale.data(), shape.E, 0, shape.all());
  const T *h = high.data(), *s = scale.data();
  cpu::softmax_gather(
      logits.data(), indices.data(), h, s, values.data(), shape.tokens, shape.E, shape.K,
      shape.by_expert, 0, shape.rows());
  EXPECT_TRUE(values.fences_stand() && high.fences_stand() && scale.fences_stand());
  return {values.values(), high.values(), scale.values()};
}

template <typename T>
std::vector<T> backward(
    const Shape& shape, const std::vector<T>& grad, const std::vector<T>& logits,
    const std::vector<int32_t>& indices, const Gathered<T>& norms) {
  std::vector<T> dots(shape.all()), out(logits.size());
  const T* values = norms.values.data();
  cpu::softmax_dots(
      grad.data(), values, indices.data(), dots.data(), shape.tokens, shape.E, shape.K,
      shape.by_expert, 0, shape.rows());
  cpu::softmax_gather_backward(
      logits.data(), norms.high.data(), norms.scale.data(), static_cast<const T*>(dots.data()),
      out.data(), shape.E, 0, shape.all());
  cpu::softmax_scatter(
      grad.data(), values, indices.data(), out.data(), shape.tokens, shape.E, shape.K,
      shape.by_expert, 0, shape.rows());
  return out;
}

// The softmax of every row by its definition, in long double.
template <typename T>
std::vector<double> softmax(const std::vector<T>& logits, int64_t E) {
  std::vector<double> gates(logits.size());
  for (size_t row = 0; row < logits.size(); row += E) {
    const long double high = *std::max_element(&logits[row], &logits[row] + E);
    long double total = 0;
    for (int64_t e = 0; e < E; ++e) total += std::exp(logits[row + e] - high);
    for (int64_t e = 0; e < E; ++e) {
      gates[row + e] = high == -kInf<T> ? 0 : std::exp(logits[row + e] - high) / total;
    }
  }
  return gates;
}

const std::vector<Shape> kShapes{{2, 7, 5, 3, false},  {2, 7, 5, 3, true},  {1, 40, 33, 2, false},
                                 {3, 19, 16, 4, true}, {1, 1, 1, 1, false}, {1, 37, 8, 6, true},
                                 {2, 5, 3, 0, false},  {1, 0, 4, 2, false}, {2, 3, 0, 2, true}};

template <typename T>
class SoftmaxGather : public ::testing::Test {};
TYPED_TEST_SUITE(SoftmaxGather, Floats);

TYPED_TEST(SoftmaxGather, IsTheSoftmaxAtTheIndices) {
  using T = TypeParam;
  for (const Shape& shape : kShapes) {
    auto logits = uniform<T>(shape.all() * shape.E, 3, -20, 20);
    for (size_t i = 0; i < logits.size(); i += 11) logits[i] = -kInf<T>;
    const auto indices = integers(
        shape.rows() * shape.K, 4, -1, static_cast<int32_t>(shape.places()));  // some are invalid
    const auto gates = softmax(logits, std::max<int64_t>(shape.E, 1));
    std::vector<double> wanted;
    for (size_t i = 0; i < indices.size(); ++i) {
      const int64_t place = shape.place(static_cast<int64_t>(i), indices[i]);
      wanted.push_back(place < 0 ? 0 : gates[place]);
    }
    expect_near(gather(shape, logits, indices).values, wanted, kRounding<T>);
  }
}

TYPED_TEST(SoftmaxGather, AbsentTokensNaNAndInfinity) {
  using T = TypeParam;
  const Shape shape{1, 4, 3, 3, false};
  const std::vector<T> logits{-kInf<T>, -kInf<T>, -kInf<T>, 1, kNaN<T>, 2,
                              1,        kInf<T>,  -kInf<T>, 7, 7,       -kInf<T>};
  const auto all = gather(shape, logits, {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2});
  const std::vector<T> n(6, kNaN<T>);
  std::vector<T> wanted{0, 0, 0};
  wanted.insert(wanted.end(), n.begin(), n.end());
  wanted.insert(wanted.end(), {0.5, 0.5, 0});
  expect_near(all.values, wanted, kRounding<T>);
  EXPECT_EQ(all.high[0], 0);
  EXPECT_EQ(all.scale[0], 0);
}

TEST(SoftmaxGatherBackward, IsTheGradient) {
  for (const Shape& shape : kShapes) {
    auto logits = uniform<double>(shape.all() * shape.E, 5);
    if (logits.size() > 6) logits[6] = -kInf<double>;
    const auto indices =
        integers(shape.rows() * shape.K, 6, -1, static_cast<int32_t>(shape.places()));
    const auto grad = uniform<double>(static_cast<int64_t>(indices.size()), 7);
    expect_gradient(
        backward(shape, grad, logits, indices, gather(shape, logits, indices)), logits,
        [&](const std::vector<double>& moved) {
          return inner(grad, gather(shape, moved, indices).values);
        });
  }
}

TYPED_TEST(SoftmaxGather, PiecesGiveTheSameBits) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{2, 23, 7, 3, false}, Shape{2, 23, 7, 5, true}}) {
    const auto logits = uniform<T>(shape.all() * shape.E, 8);
    const auto indices =
        integers(shape.rows() * shape.K, 9, 0, static_cast<int32_t>(shape.places()) - 1);
    const auto norms = gather(shape, logits, indices);
    const T *high = norms.high.data(), *scale = norms.scale.data();
    expect_pieces<T>(shape.all(), 1, [&](int64_t begin, int64_t end, T* out) {
      std::vector<T> other(shape.all());
      cpu::softmax_norms(logits.data(), out, other.data(), shape.E, begin, end);
    });
    expect_pieces<T>(shape.rows(), shape.K, [&](int64_t begin, int64_t end, T* out) {
      cpu::softmax_gather(
          logits.data(), indices.data(), high, scale, out, shape.tokens, shape.E, shape.K,
          shape.by_expert, begin, end);
    });
    const auto dots = uniform<T>(shape.all(), 10);
    expect_pieces<T>(shape.all(), shape.E, [&](int64_t begin, int64_t end, T* out) {
      cpu::softmax_gather_backward(
          logits.data(), high, scale, dots.data(), out, shape.E, begin, end);
    });
  }
}

}  // namespace
}  // namespace vmoe
