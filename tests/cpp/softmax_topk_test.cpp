#include "softmax_topk.h"

#include "softmax_gather.h"
#include "testing.h"
#include "topk.h"

namespace vmoe {
namespace {

template <typename T>
struct Chosen {
  std::vector<T> values;
  std::vector<int32_t> indices;
};

template <typename T>
void expect_same(const Chosen<T>& actual, const Chosen<T>& wanted) {
  EXPECT_EQ(actual.indices, wanted.indices);
  ASSERT_EQ(actual.values.size(), wanted.values.size());
  for (size_t i = 0; i < wanted.values.size(); ++i) {
    const T a = actual.values[i], w = wanted.values[i];
    EXPECT_TRUE(a == w || (std::isnan(a) && std::isnan(w))) << "[" << i << "] " << a << ", " << w;
  }
}

// G matrices of logits [tokens, E], and the k largest gates of every token or expert.
template <typename T>
struct Choice {
  int64_t G, tokens, E, k;
  bool of_tokens;  // every expert chooses among them

  int64_t all() const { return G * tokens; }
  int64_t rows() const { return of_tokens ? G * E : all(); }

  Chosen<T> choose(const std::vector<T>& logits, bool by_expert = false) const {
    Guarded<T> values(rows() * k), high(all()), scale(all()), gates(all() * E);
    Guarded<int32_t> indices(rows() * k);
    if (of_tokens) {
      cpu::softmax_gates(
          logits.data(), gates.data(), high.data(), scale.data(), tokens, E, by_expert, 0, all());
      const T* written = gates.data();
      cpu::softmax_choose(
          written, values.data(), indices.data(), tokens, E, k, by_expert, 0, rows());
    } else {
      cpu::softmax_topk(
          logits.data(), values.data(), indices.data(), high.data(), scale.data(), E, k, 0, all());
    }
    EXPECT_TRUE(values.fences_stand() && indices.fences_stand() && gates.fences_stand());
    EXPECT_TRUE(high.fences_stand() && scale.fences_stand());
    std::vector<T> wanted_high(all()), wanted_scale(all());
    cpu::softmax_norms(logits.data(), wanted_high.data(), wanted_scale.data(), E, 0, all());
    EXPECT_EQ(0, memcmp(high.data(), wanted_high.data(), all() * sizeof(T)));
    for (int64_t t = 0; t < all(); ++t) {
      const T a = scale.data()[t], w = wanted_scale[t];
      EXPECT_TRUE(a == w || (std::isnan(a) && std::isnan(w)));
    }
    return {values.values(), indices.values()};
  }

  // topk of all gates, those of a token that is not there being -inf.
  Chosen<T> by_definition(const std::vector<T>& logits) const {
    std::vector<T> high(all()), scale(all()), gates(all() * E);
    std::vector<int32_t> every(all() * E);
    for (size_t i = 0; i < every.size(); ++i) every[i] = static_cast<int32_t>(i % E);
    cpu::softmax_norms(logits.data(), high.data(), scale.data(), E, 0, all());
    const T *h = high.data(), *s = scale.data();
    cpu::softmax_gather(
        logits.data(), static_cast<const int32_t*>(every.data()), h, s, gates.data(), tokens, E, E,
        false, 0, all());
    for (int64_t i = 0; i < all() * E; ++i) {
      if (scale[i / E] == 0) gates[i] = -kInf<T>;
    }
    Chosen<T> out{std::vector<T>(rows() * k), std::vector<int32_t>(rows() * k)};
    const T* from = gates.data();
    cpu::topk(
        from, out.values.data(), out.indices.data(), of_tokens ? tokens : E, of_tokens ? E : 1, k,
        0, rows());
    for (size_t i = 0; i < out.values.size(); ++i) {
      if (out.values[i] != -kInf<T>) continue;
      out.values[i] = 0;
      out.indices[i] = -1;
    }
    return out;
  }

  void expect_definition(const std::vector<T>& logits) const {
    SCOPED_TRACE(
        ::testing::Message() << G << " x " << tokens << " x " << E << ", k " << k
                             << (of_tokens ? " of the tokens" : ""));
    const auto wanted = by_definition(logits);
    expect_same(choose(logits), wanted);
    if (of_tokens) expect_same(choose(logits, true), wanted);
  }
};

template <typename T>
class SoftmaxTopk : public ::testing::Test {};
TYPED_TEST_SUITE(SoftmaxTopk, Floats);

TYPED_TEST(SoftmaxTopk, IsTopkOfTheGates) {
  using T = TypeParam;
  for (const bool of_tokens : {false, true}) {
    for (const int64_t tokens : {1, 3, 16, 17, 70}) {
      for (const int64_t E : {1, 2, 7, 16, 33}) {
        for (const int64_t k : {0, 1, 2, 6, 8, 9, 16, 33}) {
          if (k > (of_tokens ? tokens : E)) continue;
          const Choice<T> choice{2, tokens, E, k, of_tokens};
          const int64_t size = 2 * tokens * E;
          choice.expect_definition(uniform<T>(size, E + k, -6, 6));
          choice.expect_definition(tied<T>(size, E + k));
          choice.expect_definition(uniform<T>(size, E, -600, 600));  // most gates are 0
          choice.expect_definition(std::vector<T>(size, T{3}));
        }
      }
    }
  }
}

TYPED_TEST(SoftmaxTopk, TokensThatAreNotThereAndNaN) {
  using T = TypeParam;
  const int64_t tokens = 40, E = 11;
  for (const bool of_tokens : {false, true}) {
    for (const int64_t k : {1, 2, 5, 8, 9, 11}) {
      for (const int64_t step : {2, 3, 1}) {  // 1: nobody is there
        auto logits = uniform<T>(2 * tokens * E, 7);
        for (int64_t t = 0; t < 2 * tokens; t += step) {
          std::fill(&logits[t * E], &logits[t * E] + E, -kInf<T>);
        }
        for (int64_t t = 0; t < 2 * tokens; t += 7) logits[t * E + t % E] = -kInf<T>;
        if (step != 1) {
          logits[3 * E + 2] = kNaN<T>;
          logits[5 * E + 1] = kInf<T>;
          logits[17 * E] = -kNaN<T>;
        }
        Choice<T>{2, tokens, E, k, of_tokens}.expect_definition(logits);
      }
    }
  }
}

TYPED_TEST(SoftmaxTopk, EqualTokensGetEqualBits) {
  using T = TypeParam;
  const int64_t tokens = 53, E = 13;
  const auto one = uniform<T>(E, 3, -9, 9);
  std::vector<T> logits;
  for (int64_t t = 0; t < tokens; ++t) logits.insert(logits.end(), one.begin(), one.end());
  const auto chosen = Choice<T>{1, tokens, E, 2, false}.choose(logits);
  for (size_t i = 2; i < chosen.values.size(); ++i) {
    EXPECT_EQ(chosen.values[i], chosen.values[i - 2]);
  }
  const auto taken = Choice<T>{1, tokens, E, tokens, true}.choose(logits);
  for (int64_t i = 0; i < tokens * E; ++i) EXPECT_EQ(taken.indices[i], i % tokens);
}

TYPED_TEST(SoftmaxTopk, PiecesMakeTheWhole) {
  using T = TypeParam;
  const int64_t tokens = 23, E = 7;
  const auto logits = uniform<T>(3 * tokens * E, 5);
  std::vector<T> high(3 * tokens), scale(3 * tokens);
  for (const int64_t k : {2, 7}) {
    expect_pieces<int32_t>(3 * tokens, k, [&](int64_t begin, int64_t end, int32_t* indices) {
      std::vector<T> values(3 * tokens * k);
      cpu::softmax_topk(
          logits.data(), values.data(), indices, high.data(), scale.data(), E, k, begin, end);
    });
  }
  for (const bool by_expert : {false, true}) {
    const auto token = [=](int64_t i) {
      return by_expert ? i / (E * tokens) * tokens + i % tokens : i / E;
    };
    expect_pieces<T>(
        3 * tokens * E, 3 * tokens,
        [&](int64_t begin, int64_t end, T* gates) {
          cpu::softmax_gates(
              logits.data(), gates, high.data(), scale.data(), tokens, E, by_expert, begin, end);
        },
        token);
  }
}

}  // namespace
}  // namespace vmoe
