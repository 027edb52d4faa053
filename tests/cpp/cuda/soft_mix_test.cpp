#include "soft_mix.h"

#include "common/row_stride.h"
#include "device.h"

namespace vmoe {
namespace {

template <typename Row>
class CudaSoftMix : public ::testing::Test {
 public:
  using T = Compute<Row>;

  // The rows of the weights without their padding.
  static std::vector<Row> rows_of(const DeviceArray<Row>& weights, int64_t S) {
    const std::vector<Row> all = weights.values();
    std::vector<Row> out;
    for (auto row = all.begin(); row != all.end(); row += row_stride<Row>(S)) {
      out.insert(out.end(), row, row + S);
    }
    return out;
  }

  static void expect_as_on_cpu(
      const std::vector<T>& logits, int64_t G, int64_t tokens, int64_t S, bool over_tokens) {
    SCOPED_TRACE(
        ::testing::Message() << G << " x " << tokens << " x " << S
                             << (over_tokens ? " over tokens" : " over slots"));
    std::vector<T> weights(logits.size());
    cpu::soft_mix(logits.data(), weights.data(), tokens, S, over_tokens, 0, G);
    DeviceArray<T> device_logits(logits);
    DeviceArray<Row> device_weights(G * tokens * row_stride<Row>(S));
    cuda::soft_mix(device_logits.data(), device_weights.data(), G, tokens, S, over_tokens, nullptr);
    expect_rounded(rows_of(device_weights, S), weights);

    auto grad = uniform<T>(static_cast<int64_t>(logits.size()), 5);
    DeviceArray<Row> again(G * tokens * row_stride<Row>(S));
    DeviceArray<T> device_grad(grad);
    cpu::soft_mix_backward(
        static_cast<const T*>(weights.data()), grad.data(), tokens, S, over_tokens, 0, G);
    cuda::soft_mix_backward(
        device_logits.data(), again.data(), device_grad.data(), G, tokens, S, over_tokens, nullptr);
    expect_near(device_grad.values(), grad, kRounding<T>);
    expect_same(rows_of(again, S), rows_of(device_weights, S));
  }

  static void expect_as_on_cpu(const std::vector<T>& logits, int64_t G, int64_t tokens, int64_t S) {
    for (const bool over_tokens : {false, true})
      expect_as_on_cpu(logits, G, tokens, S, over_tokens);
  }
};
TYPED_TEST_SUITE(CudaSoftMix, Rows);

TYPED_TEST(CudaSoftMix, Weights) {
  using T = Compute<TypeParam>;
  for (const int64_t tokens : {1, 5, 16, 70}) {
    for (const int64_t S : {1, 3, 16, 17, 32, 33, 64, 100, 130, 196, 257, 600}) {
      if (tokens > 20 && S > 200) continue;
      this->expect_as_on_cpu(uniform<T>(2 * tokens * S, S, -20, 20), 2, tokens, S);
    }
  }
  this->expect_as_on_cpu(uniform<T>(2 * 2 * 1500, 1, -9, 9), 2, 2, 1500);  // one block per row
  this->expect_as_on_cpu(uniform<T>(2500 * 3, 1, -9, 9), 1, 2500, 3);
  this->expect_as_on_cpu(
      uniform<T>(2 * 300 * 44, 1, -9, 9), 2, 300, 44);  // more tokens than registers hold
}

TYPED_TEST(CudaSoftMix, ExtremeValues) {
  using T = Compute<TypeParam>;
  using Limits = std::numeric_limits<T>;
  const std::vector<T> special{0,      -T{0},         kInf<T>,          -kInf<T>,
                               T{1e4}, Limits::max(), Limits::lowest(), -T{1e4}};
  std::mt19937_64 random(2);
  for (const int64_t S : {4, 40, 1100}) {
    const int64_t tokens = 12;
    auto logits = uniform<T>(3 * tokens * S, 4);
    for (int64_t i = 0; i < 3 * tokens * S; i += 5) logits[i] = special[random() % special.size()];
    this->expect_as_on_cpu(logits, 3, tokens, S);
    // Masked tokens, a masked slot, a token with a single slot, and a NaN.
    logits = uniform<T>(3 * tokens * S, 4);
    for (int64_t s = 0; s < S; ++s) logits[2 * S + s] = logits[5 * S + s] = -kInf<T>;
    for (int64_t t = 0; t < tokens; ++t) logits[(tokens + t) * S + 1] = -kInf<T>;
    logits[5 * S + 3] = 7;
    logits[2 * tokens * S + S + 2] = kNaN<T>;
    this->expect_as_on_cpu(logits, 3, tokens, S);
    this->expect_as_on_cpu(std::vector<T>(3 * tokens * S, -kInf<T>), 3, tokens, S);
  }
}

// A line (a token or a slot) gets the same bits at any position.
TYPED_TEST(CudaSoftMix, BitsDoNotDependOnThePosition) {
  using T = Compute<TypeParam>;
  for (const auto& [length, lines, over_tokens] :
       {std::tuple{23, 37, false},
        {24, 37, false},
        {23, 37, true},
        {23, 36, true},
        {300, 36, true}}) {
    const auto line = uniform<T>(length, 9), line_grad = uniform<T>(length, 10);
    const int64_t tokens = over_tokens ? length : lines, S = over_tokens ? lines : length;
    std::vector<T> logits(tokens * S), grad(tokens * S);
    for (int64_t i = 0; i < tokens * S; ++i) {
      logits[i] = line[over_tokens ? i / S : i % S];
      grad[i] = line_grad[over_tokens ? i / S : i % S];
    }
    DeviceArray<T> x(logits), d(grad);
    DeviceArray<TypeParam> weights(tokens * row_stride<TypeParam>(S));
    cuda::soft_mix_backward(x.data(), weights.data(), d.data(), 1, tokens, S, over_tokens, nullptr);
    const auto w = values_of(this->rows_of(weights, S));
    const auto of_logits = d.values();
    for (int64_t i = 0; i < tokens * S; ++i) {
      const int64_t first = over_tokens ? i / S * S : i % S;
      EXPECT_EQ(w[i], w[first]);
      EXPECT_EQ(of_logits[i], of_logits[first]);
    }
  }
}

TYPED_TEST(CudaSoftMix, ConvertsSlotsToRows) {
  using Row = TypeParam;
  for (const int64_t D : {1, 4, 7, 8, 64, 300}) {
    const int64_t G = 3, E = 4, C = 5;
    const auto slots = rows<Row>(E * G * C * D, D);
    std::vector<Row> wanted(slots.size());
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t g = 0; g < G; ++g) {
        const auto from = slots.begin() + (e * G + g) * C * D;
        std::copy(from, from + C * D, wanted.begin() + (g * E + e) * C * D);
      }
    }
    const auto size = static_cast<int64_t>(slots.size());
    DeviceArray<Row> device_slots(slots), moved(size), back(size);
    cuda::soft_mix_rows<Row>(device_slots.data(), moved.data(), G, E, C, D, nullptr);
    expect_same(moved.values(), wanted);
    cuda::soft_mix_slots<Row>(moved.data(), back.data(), G, E, C, D, nullptr);
    expect_same(back.values(), slots);
  }
}

TYPED_TEST(CudaSoftMix, EmptyShapes) {
  this->expect_as_on_cpu({}, 0, 3, 4);
  this->expect_as_on_cpu({}, 2, 0, 4);
  this->expect_as_on_cpu({}, 2, 3, 0);
  DeviceArray<TypeParam> none(0);
  cuda::soft_mix_rows<TypeParam>(none.data(), none.data(), 2, 3, 0, 4, nullptr);
  cuda::soft_mix_slots<TypeParam>(none.data(), none.data(), 2, 3, 4, 0, nullptr);
}

}  // namespace
}  // namespace vmoe
