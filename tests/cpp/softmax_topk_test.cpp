#include "softmax_topk.h"

#include "softmax_gather.h"
#include "softmax_topk_oracle.h"

namespace vmoe {
namespace {

template <typename T>
void expect_same(const Chosen<T>& actual, const Chosen<T>& wanted) {
  EXPECT_EQ(actual.indices, wanted.indices);
  ASSERT_EQ(actual.values.size(), wanted.values.size());
  for (size_t i = 0; i < wanted.values.size(); ++i) {
    const T a = actual.values[i], w = wanted.values[i];
    EXPECT_TRUE(a == w || (std::isnan(a) && std::isnan(w))) << "[" << i << "] " << a << ", " << w;
  }
}

template <typename T>
Chosen<T> choose(const Choice& choice, const std::vector<T>& logits, bool by_expert = false) {
  const auto [G, tokens, E, k, of_tokens] = choice;
  const int64_t all = choice.all(), rows = choice.rows();
  Guarded<T> values(rows * k), high(all), scale(all), gates(all * E);
  Guarded<int32_t> indices(rows * k);
  if (of_tokens) {
    cpu::softmax_gates(
        logits.data(), gates.data(), high.data(), scale.data(), tokens, E, by_expert, 0, all);
    const T* written = gates.data();
    cpu::softmax_choose(written, values.data(), indices.data(), tokens, E, k, by_expert, 0, rows);
  } else {
    cpu::softmax_topk(
        logits.data(), values.data(), indices.data(), high.data(), scale.data(), E, k, 0, all);
  }
  EXPECT_TRUE(values.fences_stand() && indices.fences_stand() && gates.fences_stand());
  EXPECT_TRUE(high.fences_stand() && scale.fences_stand());
  std::vector<T> wanted_high(all), wanted_scale(all);
  cpu::softmax_norms(logits.data(), wanted_high.data(), wanted_scale.data(), E, 0, all);
  EXPECT_EQ(0, memcmp(high.data(), wanted_high.data(), all * sizeof(T)));
  for (int64_t t = 0; t < all; ++t) {
    const T a = scale.data()[t], w = wanted_scale[t];
    EXPECT_TRUE(a == w || (std::isnan(a) && std::isnan(w)));
  }
  return {values.values(), indices.values()};
}

// All gates by softmax_gather, with -inf for masked tokens.
template <typename T>
std::vector<T> gates_of(const Choice& choice, const std::vector<T>& logits) {
  const int64_t E = choice.E, all = choice.all();
  std::vector<T> high(all), scale(all), gates(all * E);
  const auto every = choice.every_expert();
  cpu::softmax_norms(logits.data(), high.data(), scale.data(), E, 0, all);
  const T *h = high.data(), *s = scale.data();
  cpu::softmax_gather(
      logits.data(), every.data(), h, s, gates.data(), choice.tokens, E, E, false, 0, all);
  mark_absent(scale, E, gates);
  return gates;
}

template <typename T>
class SoftmaxTopk : public ::testing::Test {
 public:
  static void expect_definition(const Choice& choice, const std::vector<T>& logits) {
    SCOPED_TRACE(::testing::Message() << choice);
    const auto wanted = chosen_by_definition(choice, gates_of(choice, logits));
    expect_same(choose(choice, logits), wanted);
    if (choice.of_tokens) expect_same(choose(choice, logits, true), wanted);
  }
};
TYPED_TEST_SUITE(SoftmaxTopk, Floats);

TYPED_TEST(SoftmaxTopk, IsTopkOfTheGates) {
  using T = TypeParam;
  for (const bool of_tokens : {false, true}) {
    for (const int64_t tokens : {1, 3, 16, 17, 70}) {
      for (const int64_t E : {1, 2, 7, 16, 33}) {
        for (const int64_t k : {0, 1, 2, 6, 8, 9, 16, 33}) {
          if (k > (of_tokens ? tokens : E)) continue;
          const Choice choice{2, tokens, E, k, of_tokens};
          const int64_t size = 2 * tokens * E;
          this->expect_definition(choice, uniform<T>(size, E + k, -6, 6));
          this->expect_definition(choice, tied<T>(size, E + k));
          this->expect_definition(choice, uniform<T>(size, E, -600, 600));  // most gates are 0
          this->expect_definition(choice, std::vector<T>(size, T{3}));
        }
      }
    }
  }
}

TYPED_TEST(SoftmaxTopk, AbsentTokensAndNaN) {
  using T = TypeParam;
  const int64_t tokens = 40, E = 11;
  for (const bool of_tokens : {false, true}) {
    for (const int64_t k : {1, 2, 5, 8, 9, 11}) {
      for (const int64_t step : {2, 3, 1}) {  // 1: all tokens are absent
        const auto logits = strange_logits<T>(tokens, E, step);
        this->expect_definition({2, tokens, E, k, of_tokens}, logits);
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
  const auto chosen = choose({1, tokens, E, 2, false}, logits);
  for (size_t i = 2; i < chosen.values.size(); ++i) {
    EXPECT_EQ(chosen.values[i], chosen.values[i - 2]);
  }
  const auto taken = choose({1, tokens, E, tokens, true}, logits);
  for (int64_t i = 0; i < tokens * E; ++i) EXPECT_EQ(taken.indices[i], i % tokens);
}

TYPED_TEST(SoftmaxTopk, PiecesGiveTheSameBits) {
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
