#include "common/slots.h"
#include "device.h"
#include "soft_mix.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, tokens, E, C, D;
  bool over_tokens;

  int64_t S() const { return E * C; }
  int64_t lines() const { return over_tokens ? S() : tokens; }
  int64_t count() const { return over_tokens ? tokens : S(); }
  // The row of line i in the result, and the row of value i in the values. The lines of a group are
  // the rows of its result: slots in means over tokens, tokens in means over slots.
  int64_t line_row(int64_t g, int64_t i) const { return row(g, i, !over_tokens); }
  int64_t value_row(int64_t g, int64_t i) const { return row(g, i, over_tokens); }
  int64_t logit(int64_t g, int64_t line, int64_t value) const {
    return over_tokens ? (g * tokens + value) * S() + line : (g * tokens + line) * S() + value;
  }

 private:
  int64_t row(int64_t g, int64_t i, bool token) const {
    return token ? g * tokens + i : row_of_slot(g, i, G, C);
  }
};

template <typename Row>
class CudaSoftMixProduct : public ::testing::Test {
 public:
  static std::vector<Row> run(
      const Shape& shape, const std::vector<float>& logits, const std::vector<Row>& values) {
    const auto [G, tokens, E, C, D, over_tokens] = shape;
    DeviceArray<float> device_logits(logits);
    DeviceArray<Row> device_values(values), out(G * shape.lines() * D);
    EXPECT_TRUE(
        cuda::soft_mix_product<Row>(
            device_logits.data(), device_values.data(), out.data(), G, tokens, E, C, D, over_tokens,
            nullptr));
    return out.values();
  }

  static bool takes(const Shape& shape) {
    const auto [G, tokens, E, C, D, over_tokens] = shape;
    DeviceArray<float> logits(std::vector<float>(G * tokens * shape.S()));
    DeviceArray<Row> values(rows<Row>(G * shape.count() * D, 1)), out(G * shape.lines() * D);
    return cuda::soft_mix_product<Row>(
        logits.data(), values.data(), out.data(), G, tokens, E, C, D, over_tokens, nullptr);
  }

  // Compares with means in float64 with unrounded weights. The kernel rounds each weight to 16
  // bits.
  static void expect_means(
      const Shape& shape, const std::vector<float>& logits, const std::vector<Row>& values) {
    const auto [G, tokens, E, C, D, over_tokens] = shape;
    SCOPED_TRACE(
        ::testing::Message() << G << " x " << tokens << " x " << E << " * " << C << " x " << D
                             << (over_tokens ? " over tokens" : " over slots"));
    const std::vector<Row> out = run(shape, logits, values);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t line = 0; line < shape.lines(); ++line) {
        double high = -kInf<double>, total = 0;
        for (int64_t i = 0; i < shape.count(); ++i) {
          high = std::max<double>(high, logits[shape.logit(g, line, i)]);
        }
        if (high == -kInf<double>) high = 0;
        std::vector<double> weights;
        for (int64_t i = 0; i < shape.count(); ++i) {
          weights.push_back(std::exp(logits[shape.logit(g, line, i)] - high));
          total += weights.back();
        }
        for (int64_t d = 0; d < D; ++d) {
          double wanted = 0, sizes = 0;
          for (int64_t i = 0; total > 0 && i < shape.count(); ++i) {
            const double part =
                weights[i] / total * value_of(values[shape.value_row(g, i) * D + d]);
            wanted += part;
            sizes += std::abs(part);
          }
          const double actual = value_of(out[shape.line_row(g, line) * D + d]);
          const double tolerance = kUnit<Row> * (sizes + std::abs(wanted)) + 1e-6;
          ASSERT_NEAR(actual, wanted, tolerance) << "line " << line << " of " << g << ", " << d;
        }
      }
    }
  }

  static void expect_means(const Shape& shape) {
    const int64_t size = shape.G * shape.tokens * shape.S();
    expect_means(
        shape, uniform<float>(size, size, -6, 6), rows<Row>(shape.G * shape.count() * shape.D, 3));
  }
};
TYPED_TEST_SUITE(CudaSoftMixProduct, Halves);

// The mean of a single unmasked value is that value, whatever the positions of the value and the
// line.
TYPED_TEST(CudaSoftMixProduct, MeanOfOneValueIsThatValue) {
  using Row = TypeParam;
  for (const Shape& shape :
       {Shape{2, 37, 3, 7, 136, true}, Shape{2, 37, 3, 7, 136, false},
        Shape{1, 130, 100, 1, 8, true}, Shape{1, 130, 100, 1, 8, false},
        Shape{2, 256, 9, 2, 264, true}, Shape{2, 5, 256, 1, 40, false}}) {
    std::mt19937_64 random(7);
    std::vector<float> logits(shape.G * shape.tokens * shape.S(), -kInf<float>);
    const auto values = rows<Row>(shape.G * shape.count() * shape.D, 8);
    std::vector<Row> wanted(shape.G * shape.lines() * shape.D);
    for (int64_t g = 0; g < shape.G; ++g) {
      for (int64_t line = 0; line < shape.lines(); ++line) {
        const int64_t i = integer(random, 0, shape.count() - 1);
        logits[shape.logit(g, line, i)] = 30;
        const auto from = values.begin() + shape.value_row(g, i) * shape.D;
        std::copy(from, from + shape.D, wanted.begin() + shape.line_row(g, line) * shape.D);
      }
    }
    const auto actual = values_of(this->run(shape, logits, values));
    EXPECT_EQ(actual, values_of(wanted));  // as numbers: 0 equals -0
  }
}

TYPED_TEST(CudaSoftMixProduct, Means) {
  for (const bool over_tokens : {false, true}) {
    this->expect_means({1, 1, 1, 1, 8, over_tokens});
    this->expect_means({3, 16, 16, 1, 16, over_tokens});
    this->expect_means({2, 17, 5, 3, 128, over_tokens});
    this->expect_means({1, 49, 33, 1, 72, over_tokens});
    this->expect_means({2, 70, 25, 4, 200, over_tokens});   // one block of 112 lines
    this->expect_means({1, 100, 100, 1, 16, over_tokens});  // close to 48 KiB of shared memory
    this->expect_means({1, 128, 128, 1, 32, over_tokens});  // one block of 128 lines
    this->expect_means({1, 196, 196, 1, 48, over_tokens});  // two blocks of 112 lines
    this->expect_means({2, over_tokens ? 9 : 300, over_tokens ? 150 : 4, 2, 16, over_tokens});
  }
}

TYPED_TEST(CudaSoftMixProduct, ExtremeValues) {
  using Row = TypeParam;
  for (const Shape& shape : {Shape{2, 21, 6, 3, 16, true}, Shape{2, 21, 5, 4, 16, false}}) {
    auto logits = uniform<float>(shape.G * shape.tokens * shape.S(), 4, -90, 90);
    const auto values = rows<Row>(shape.G * shape.count() * shape.D, 8);
    const auto fill = [&](int64_t line, float value) {
      for (int64_t i = 0; i < shape.count(); ++i) logits[shape.logit(1, line, i)] = value;
    };
    fill(0, -kInf<float>);
    fill(1, std::numeric_limits<float>::lowest());
    fill(2, std::numeric_limits<float>::max());
    for (int64_t line = 0; line < shape.lines(); ++line) {
      logits[shape.logit(0, line, 3)] = -kInf<float>;  // a masked value
    }
    this->expect_means(shape, logits, values);

    logits[shape.logit(1, 4, 2)] = kNaN<float>;
    logits[shape.logit(1, 5, 2)] = kInf<float>;
    const auto out = values_of(this->run(shape, logits, values));
    for (int64_t line = 0; line < shape.lines(); ++line) {
      for (int64_t d = 0; d < shape.D; ++d) {
        EXPECT_EQ(std::isnan(out[shape.line_row(1, line) * shape.D + d]), line == 4 || line == 5);
      }
    }
  }
}

// The padding of tiles must not spread an infinity to other columns either.
TYPED_TEST(CudaSoftMixProduct, AnInfinityStaysInItsColumn) {
  using Row = TypeParam;
  for (const Shape& shape : {Shape{1, 37, 6, 3, 200, true}, Shape{1, 21, 37, 1, 200, false}}) {
    const auto logits = uniform<float>(shape.tokens * shape.S(), 4);
    auto values = rows<Row>(shape.count() * shape.D, 8);
    const Row infinity{std::is_same_v<Row, BFloat16> ? uint16_t{0x7F80} : uint16_t{0x7C00}};
    for (int64_t i = 0; i < shape.count(); ++i) values[i * shape.D + 130] = infinity;
    const auto out = values_of(this->run(shape, logits, values));
    for (int64_t i = 0; i < shape.lines() * shape.D; ++i) {
      EXPECT_EQ(std::isfinite(out[i]), i % shape.D != 130) << i;
    }
  }
}

// A line gets the same bits at any position and in any number of groups. With few groups, its
// columns are divided among several blocks.
TYPED_TEST(CudaSoftMixProduct, BitsDoNotDependOnThePosition) {
  using Row = TypeParam;
  for (const bool over_tokens : {false, true}) {
    const Shape few{1, 60, 60, 1, 264, over_tokens}, many{30, 60, 60, 1, 264, over_tokens};
    const auto line = uniform<float>(60, 9);
    const auto values = rows<Row>(60 * 264, 10);
    const auto repeated = [&](const Shape& shape) {
      std::vector<float> logits(shape.G * 60 * 60);
      std::vector<Row> of_groups(shape.G * 60 * 264);
      for (int64_t g = 0; g < shape.G; ++g) {
        for (int64_t i = 0; i < 60; ++i) {
          for (int64_t j = 0; j < 60; ++j) logits[shape.logit(g, i, j)] = line[j];
          const auto from = values.begin() + i * 264;
          std::copy(from, from + 264, of_groups.begin() + shape.value_row(g, i) * 264);
        }
      }
      return this->run(shape, logits, of_groups);
    };
    const auto one = repeated(few), other = repeated(many);
    for (size_t i = 0; i < other.size(); ++i) ASSERT_EQ(other[i].bits, one[i % 264].bits);
  }
}

TYPED_TEST(CudaSoftMixProduct, RefusesUnsupportedShapes) {
  for (const bool over_tokens : {false, true}) {
    const auto of = [&](int64_t count, int64_t lines, int64_t D) {
      return over_tokens ? Shape{1, count, lines, 1, D, true} : Shape{1, lines, count, 1, D, false};
    };
    EXPECT_TRUE(this->takes(of(256, 3, 8)));
    EXPECT_FALSE(this->takes(of(257, 3, 8)));
    EXPECT_FALSE(this->takes(of(0, 3, 8)));
    EXPECT_FALSE(this->takes(of(4, 3, 12)));
    EXPECT_TRUE(this->takes(of(4, 3, 0)));
    EXPECT_TRUE(this->takes({0, 4, 4, 1, 8, over_tokens}));
  }
  EXPECT_TRUE(this->takes({2, 4, 0 + 1, 0, 8, true}));  // no slots
}

#ifdef VMOE_SHIM
// With little shared memory, a block computes fewer lines, or soft_mix_product returns false.
TYPED_TEST(CudaSoftMixProduct, LittleSharedMemory) {
  const size_t before = shim::shared_limit;
  for (const bool over_tokens : {false, true}) {
    shim::shared_limit = 99 << 10;
    this->expect_means({1, 256, 256, 1, 16, over_tokens});
    shim::shared_limit = 48 << 10;
    this->expect_means({1, 120, 120, 1, 16, over_tokens});
    EXPECT_FALSE(this->takes({1, 256, 256, 1, 16, over_tokens}));
  }
  shim::shared_limit = before;
}
#endif

}  // namespace
}  // namespace vmoe
