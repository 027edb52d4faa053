#include "soft_mix.h"

#include "testing.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, S;
  int64_t size() const { return G * T * S; }
};

// Calls body(indices) for every line over which a softmax is taken, with the indices of its
// entries.
template <typename Body>
void for_lines(const Shape& shape, bool over_tokens, Body&& body) {
  for (int64_t g = 0; g < shape.G; ++g) {
    const int64_t lines = over_tokens ? shape.S : shape.T, length = over_tokens ? shape.T : shape.S;
    for (int64_t line = 0; line < lines; ++line) {
      std::vector<int64_t> elements;
      for (int64_t i = 0; i < length; ++i) {
        const int64_t t = over_tokens ? i : line, s = over_tokens ? line : i;
        elements.push_back((g * shape.T + t) * shape.S + s);
      }
      body(elements);
    }
  }
}

template <typename T>
std::vector<T> soft_mix(const Shape& shape, const std::vector<T>& logits, bool over_tokens) {
  Guarded<T> weights(shape.size());
  cpu::soft_mix(logits.data(), weights.data(), shape.T, shape.S, over_tokens, 0, shape.G);
  EXPECT_TRUE(weights.fences_stand());
  return weights.values();
}

template <typename T>
std::vector<T> soft_mix_backward(
    const Shape& shape, const std::vector<T>& weights, std::vector<T> grad, bool over_tokens) {
  cpu::soft_mix_backward(weights.data(), grad.data(), shape.T, shape.S, over_tokens, 0, shape.G);
  return grad;
}

template <typename T>
class SoftMix : public ::testing::TestWithParam<bool> {
 public:
  // The definition in long double, whose range makes subtracting the maximum unnecessary.
  static void expect_softmax(const Shape& shape, const std::vector<T>& logits) {
    for (const bool over_tokens : {false, true}) {
      SCOPED_TRACE(
          ::testing::Message() << "G " << shape.G << " T " << shape.T << " S " << shape.S
                               << (over_tokens ? " over tokens" : " over slots"));
      std::vector<double> wanted(shape.size());
      for_lines(shape, over_tokens, [&](const std::vector<int64_t>& line) {
        long double sum = 0;
        for (const int64_t i : line) sum += std::exp(static_cast<long double>(logits[i]));
        for (const int64_t i : line) {
          const long double weight = std::exp(static_cast<long double>(logits[i]));
          wanted[i] = sum == 0 ? 0 : static_cast<double>(weight / sum);
        }
      });
      expect_near(soft_mix(shape, logits, over_tokens), wanted, kRounding<T>);
    }
  }
};
TYPED_TEST_SUITE(SoftMix, Floats);

TYPED_TEST(SoftMix, IsASoftmax) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1},
        {3, 5, 4},
        {2, 1, 7},
        {2, 7, 1},
        {1, 64, 33},
        {2, 16, 16},
        {2, 3, 15},
        {2, 3, 17},
        {1, 5, 47}}) {
    this->expect_softmax(shape, uniform<T>(shape.size(), 1, -8, 8));
    this->expect_softmax(shape, tied<T>(shape.size(), 2));
  }
}

TYPED_TEST(SoftMix, EmptyShapes) {
  for (const Shape& shape : {Shape{0, 3, 4}, {2, 0, 4}, {2, 3, 0}, {2, 0, 0}}) {
    this->expect_softmax(shape, {});
    for (const bool over_tokens : {false, true}) {
      EXPECT_TRUE(soft_mix_backward<TypeParam>(shape, {}, {}, over_tokens).empty());
    }
  }
}

TYPED_TEST(SoftMix, ExtremeValues) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  for (const bool over_tokens : {false, true}) {
    const Shape shape = over_tokens ? Shape{1, 4, 1} : Shape{1, 1, 4};
    const auto weights = [&](const std::vector<T>& logits) {
      return soft_mix(shape, logits, over_tokens);
    };
    const std::vector<T> quarters(4, T{1} / 4), first{1, 0, 0, 0};
    EXPECT_EQ(weights({T{1e4}, T{1e4}, T{1e4}, T{1e4}}), quarters);
    EXPECT_EQ(weights({-T{1e4}, -T{1e4}, -T{1e4}, -T{1e4}}), quarters);
    EXPECT_EQ(weights({T{1e4}, -T{1e4}, 0, 0}), first);
    EXPECT_EQ(weights({Limits::max(), Limits::lowest(), 0, -kInf<T>}), first);
    EXPECT_EQ(weights({Limits::lowest(), -kInf<T>, -kInf<T>, -kInf<T>}), first);
    EXPECT_EQ(weights({Limits::denorm_min(), 0, -T{0}, -Limits::denorm_min()}), quarters);
  }
}

TYPED_TEST(SoftMix, MaskedLineGetsZeros) {
  using T = TypeParam;
  for (const bool over_tokens : {false, true}) {
    const Shape shape{2, 4, 3};
    auto logits = uniform<T>(shape.size(), 3);
    int64_t count = 0;
    for_lines(shape, over_tokens, [&](const std::vector<int64_t>& line) {
      if (count++ % 2 == 0) {
        for (const int64_t i : line) logits[i] = -kInf<T>;
      } else {
        logits[line[0]] = -kInf<T>;  // one masked entry: the rest of the line sums to 1
      }
    });
    this->expect_softmax(shape, logits);
    const auto weights = soft_mix(shape, logits, over_tokens);
    const auto grad = soft_mix_backward(shape, weights, uniform<T>(shape.size(), 4), over_tokens);
    for (int64_t i = 0; i < shape.size(); ++i) {
      if (logits[i] == -kInf<T>) {
        EXPECT_EQ(weights[i], 0);
        EXPECT_EQ(grad[i], 0);
      }
    }
  }
}

TYPED_TEST(SoftMix, NaNFillsOnlyItsLine) {
  using T = TypeParam;
  const Shape shape{2, 3, 19};
  for (const bool over_tokens : {false, true}) {
    for (const T rest : {T{1}, -kInf<T>, kInf<T>}) {
      for (int64_t bad = 0; bad < shape.size(); ++bad) {
        SCOPED_TRACE(::testing::Message() << "element " << bad << " among " << rest);
        std::vector<T> logits(shape.size(), 0);
        for_lines(shape, over_tokens, [&](const std::vector<int64_t>& line) {
          if (std::find(line.begin(), line.end(), bad) == line.end()) return;
          for (const int64_t i : line) logits[i] = i == bad ? kNaN<T> : rest;
        });
        const auto weights = soft_mix(shape, logits, over_tokens);
        for_lines(shape, over_tokens, [&](const std::vector<int64_t>& line) {
          const bool hit = std::find(line.begin(), line.end(), bad) != line.end();
          for (const int64_t i : line) EXPECT_EQ(std::isnan(weights[i]), hit) << i;
        });
      }
    }
  }
}

// Equal lines get equal bits at any position, in whole vectors and in remainders.
TYPED_TEST(SoftMix, PositionDoesNotMatter) {
  using T = TypeParam;
  const int64_t length = 23;
  const auto line = uniform<T>(length, 9), line_grad = uniform<T>(length, 10);
  for (const bool over_tokens : {false, true}) {
    const Shape shape = over_tokens ? Shape{1, length, 37} : Shape{1, 37, length};
    std::vector<T> logits(shape.size()), grad(shape.size());
    for_lines(shape, over_tokens, [&](const std::vector<int64_t>& at) {
      for (int64_t i = 0; i < length; ++i) {
        logits[at[i]] = line[i];
        grad[at[i]] = line_grad[i];
      }
    });
    const auto weights = soft_mix(shape, logits, over_tokens);
    const auto logits_grad = soft_mix_backward(shape, weights, grad, over_tokens);
    std::vector<int64_t> first;
    for_lines(shape, over_tokens, [&](const std::vector<int64_t>& at) {
      if (first.empty()) first = at;
      for (int64_t i = 0; i < length; ++i) {
        EXPECT_EQ(weights[at[i]], weights[first[i]]);
        EXPECT_EQ(logits_grad[at[i]], logits_grad[first[i]]);
      }
    });
  }
}

TYPED_TEST(SoftMix, PiecesGiveTheSameBits) {
  using T = TypeParam;
  const Shape shape{5, 4, 3};
  const auto logits = uniform<T>(shape.size(), 5), grad = uniform<T>(shape.size(), 6);
  for (const bool over_tokens : {false, true}) {
    expect_pieces<T>(shape.G, shape.T * shape.S, [&](int64_t begin, int64_t end, T* weights) {
      cpu::soft_mix(logits.data(), weights, shape.T, shape.S, over_tokens, begin, end);
    });
    // Computed in place: elements outside the piece must keep their values.
    const auto weights = soft_mix(shape, logits, over_tokens);
    const auto whole = soft_mix_backward(shape, weights, grad, over_tokens);
    auto piece = grad;
    cpu::soft_mix_backward(weights.data(), piece.data(), shape.T, shape.S, over_tokens, 1, 3);
    for (int64_t i = 0; i < shape.size(); ++i) {
      const int64_t g = i / (shape.T * shape.S);
      EXPECT_EQ(piece[i], g >= 1 && g < 3 ? whole[i] : grad[i]);
    }
  }
}

TEST(SoftMixBackward, IsTheGradient) {
  const Shape shape{2, 4, 3};
  auto logits = uniform<double>(shape.size(), 7);
  logits[5] = -kInf<double>;
  const auto grad = uniform<double>(shape.size(), 8);
  for (const bool over_tokens : {false, true}) {
    const auto weights = soft_mix(shape, logits, over_tokens);
    expect_gradient(
        soft_mix_backward(shape, weights, grad, over_tokens), logits,
        [&](const std::vector<double>& moved) {
          return inner(grad, soft_mix(shape, moved, over_tokens));
        });
  }
}

}  // namespace
}  // namespace vmoe
