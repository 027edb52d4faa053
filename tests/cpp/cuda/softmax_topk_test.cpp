#include "softmax_topk.h"

#include "../softmax_topk_oracle.h"
#include "device.h"
#include "softmax_gather.h"

namespace vmoe {
namespace {

template <typename T>
class CudaSoftmaxTopk : public ::testing::Test {
 public:
  static Chosen<T> choose(const Choice& choice, const std::vector<T>& logits) {
    const auto [G, tokens, E, k, of_tokens] = choice;
    const int64_t size = choice.rows() * k;
    DeviceArray<T> x(logits), values(size), high(choice.all()), scale(choice.all());
    DeviceArray<int32_t> indices(size);
    DeviceArray<char> workspace(
        static_cast<int64_t>(cuda::softmax_topk_workspace<T>(G, tokens, E, k, of_tokens)));
    cuda::softmax_topk(
        x.data(), values.data(), indices.data(), high.data(), scale.data(), G, tokens, E, k,
        of_tokens, workspace.data(), nullptr);
    std::vector<T> wanted_high(choice.all()), wanted_scale(choice.all());
    cpu::softmax_norms(logits.data(), wanted_high.data(), wanted_scale.data(), E, 0, choice.all());
    expect_near(high.values(), wanted_high, 0);
    expect_near(scale.values(), wanted_scale, kRounding<T>);
    return {values.values(), indices.values()};
  }

  // All gates, computed by softmax_gather on the device, with -inf for masked tokens. Compares them
  // with the gates of the CPU.
  static std::vector<T> gates(const Choice& choice, const std::vector<T>& logits) {
    const auto [G, tokens, E, k, of_tokens] = choice;
    const auto size = static_cast<int64_t>(logits.size());
    DeviceArray<T> x(logits), values(size), high(choice.all()), scale(choice.all());
    DeviceArray<int32_t> indices(choice.every_expert());
    cuda::softmax_gather(
        x.data(), indices.data(), values.data(), high.data(), scale.data(), G, tokens, E, E, false,
        nullptr);
    auto gates = values.values();
    mark_absent(scale.values(), E, gates);
    std::vector<T> wanted(logits.size()), other(2 * choice.all());
    cpu::softmax_gates(
        logits.data(), wanted.data(), other.data(), other.data() + choice.all(), tokens, E, false,
        0, choice.all());
    expect_near(gates, wanted, kRounding<T>);
    return gates;
  }

  // Expects the largest of the gates that gates() returns, to the bit.
  static void expect_definition(const Choice& choice, const std::vector<T>& logits) {
    SCOPED_TRACE(::testing::Message() << choice);
    const auto actual = choose(choice, logits);
    const auto wanted = chosen_by_definition(choice, gates(choice, logits));
    EXPECT_EQ(actual.indices, wanted.indices);
    expect_near(actual.values, wanted.values, 0);
  }

  static void expect_definition(const Choice& choice) {
    const int64_t size = choice.all() * choice.E;
    expect_definition(choice, uniform<T>(size, choice.E + choice.k, -6, 6));
    expect_definition(choice, tied<T>(size, choice.E + choice.k));
  }
};
TYPED_TEST_SUITE(CudaSoftmaxTopk, Floats);

// The sizes are around multiples of the numbers of lanes, of entries per lane and of entries per
// load.
TYPED_TEST(CudaSoftmaxTopk, TokensChoose) {
  for (const int64_t E : {1, 3, 16, 17, 32, 33, 64, 100, 128, 130, 256, 300, 512, 600, 1024}) {
    for (const int64_t k : {0, 1, 2, 5, 16, 17, 33}) {
      if (k <= E) this->expect_definition({2, E < 200 && k < 17 ? 35 : 3, E, k, false});
    }
  }
}

TYPED_TEST(CudaSoftmaxTopk, TokensChooseFromLongRows) {
  for (const int64_t E : {1025, 1537, 4090, 4096, 4100}) {
    for (const int64_t k : {1, 16, 40}) this->expect_definition({1, 3, E, k, false});
  }
}

TYPED_TEST(CudaSoftmaxTopk, ExpertsChoose) {
  for (const int64_t E : {1, 8, 31, 32, 60, 128}) {
    for (const int64_t tokens : {1, 3, 33, 196, 300}) {
      for (const int64_t k : {1, 6, 16}) {
        if (k > tokens || (E > 60 && tokens > 33)) continue;
        this->expect_definition({2, tokens, E, k, true});
      }
    }
  }
}

// Gates are written to device memory if there are many picks, many experts or many tokens.
TYPED_TEST(CudaSoftmaxTopk, ExpertsChooseThroughDeviceMemory) {
  this->expect_definition({2, 40, 3, 17, true});
  this->expect_definition({1, 300, 33, 150, true});
  this->expect_definition({2, 130, 128, 20, true});
  this->expect_definition({2, 5, 130, 2, true});
  this->expect_definition({1, 1500, 3, 4, true});
  this->expect_definition({1, 9000, 2, 8000, true});
  this->expect_definition({1, 3, 4096, 2, true});
}

TYPED_TEST(CudaSoftmaxTopk, AbsentTokensAndNaN) {
  using T = TypeParam;
  for (const int64_t E : {11, 40, 1300}) {
    const int64_t tokens = 20;
    for (const int64_t step : {2, 3, 1}) {  // 1: all tokens are absent
      const auto logits = strange_logits<T>(tokens, E, step);
      for (const int64_t k : {1, 2, 11, 18}) {
        if (k <= E) this->expect_definition({2, tokens, E, k, false}, logits);
        if (E < 1000) this->expect_definition({2, tokens, E, k, true}, logits);
      }
    }
  }
}

// The same gates underflow to 0 on the device as on the CPU, and tie.
TYPED_TEST(CudaSoftmaxTopk, MostGatesAreZero) {
  using T = TypeParam;
  for (const int64_t E : {7, 130, 1100}) {
    const auto logits = uniform<T>(10 * E, 3, -6000, 6000);
    this->expect_definition({1, 10, E, 6, false}, logits);
    this->expect_definition({1, 10, E, 6, true}, logits);
    std::vector<T> values(60), high(10), scale(10);
    std::vector<int32_t> indices(60);
    cpu::softmax_topk(
        logits.data(), values.data(), indices.data(), high.data(), scale.data(), E, 6, 0, 10);
    EXPECT_EQ(this->choose({1, 10, E, 6, false}, logits).indices, indices);
  }
}

TYPED_TEST(CudaSoftmaxTopk, EmptyShapes) {
  const std::vector<TypeParam> none;
  for (const bool of_tokens : {false, true}) {
    this->expect_definition({0, 3, 4, 2, of_tokens}, none);
    this->expect_definition({2, 0, 4, 0, of_tokens}, none);
    this->expect_definition({2, 3, 0, 0, of_tokens}, none);
    this->expect_definition({1, 1, 2, 0, of_tokens}, {1, 2});
  }
}

}  // namespace
}  // namespace vmoe
