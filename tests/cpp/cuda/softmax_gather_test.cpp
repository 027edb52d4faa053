#include "softmax_gather.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, tokens, E, K;
  bool by_expert;

  int64_t all() const { return G * tokens; }
  int64_t rows() const { return G * (by_expert ? E : tokens); }
  int64_t size() const { return rows() * K; }
  int64_t places() const { return by_expert ? tokens : E; }
};

template <typename T>
class CudaSoftmaxGather : public ::testing::Test {
 public:
  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<T>& logits, const std::vector<int32_t>& indices) {
    const auto [G, tokens, E, K, by_expert] = shape;
    SCOPED_TRACE(
        ::testing::Message() << G << " x " << tokens << " x " << E << ", K " << K
                             << (by_expert ? " by expert" : ""));
    std::vector<T> values(shape.size()), high(shape.all()), scale(shape.all());
    cpu::softmax_norms(logits.data(), high.data(), scale.data(), E, 0, shape.all());
    const T *h = high.data(), *s = scale.data();
    cpu::softmax_gather(
        logits.data(), indices.data(), h, s, values.data(), tokens, E, K, by_expert, 0,
        shape.rows());
    DeviceArray<T> device_logits(logits), device_values(shape.size()), device_high(shape.all());
    DeviceArray<T> device_scale(shape.all());
    DeviceArray<int32_t> device_indices(indices);
    cuda::softmax_gather(
        device_logits.data(), device_indices.data(), device_values.data(), device_high.data(),
        device_scale.data(), G, tokens, E, K, by_expert, nullptr);
    expect_near(device_values.values(), values, kRounding<T>);
    expect_near(device_high.values(), high, 0);
    expect_near(device_scale.values(), scale, kRounding<T>);

    const auto grad = uniform<T>(shape.size(), 11);
    std::vector<T> dots(shape.all()), grad_logits(logits.size());
    const T* v = values.data();
    cpu::softmax_dots(
        grad.data(), v, indices.data(), dots.data(), tokens, E, K, by_expert, 0, shape.rows());
    const T* d = dots.data();
    cpu::softmax_gather_backward(logits.data(), h, s, d, grad_logits.data(), E, 0, shape.all());
    cpu::softmax_scatter(
        grad.data(), v, indices.data(), grad_logits.data(), tokens, E, K, by_expert, 0,
        shape.rows());
    // Takes the values and norms of the CPU, so that only rounding in the backward makes a
    // difference.
    DeviceArray<T> device_grad(grad), same_values(values), same_high(high), same_scale(scale);
    DeviceArray<T> device_grad_logits(static_cast<int64_t>(logits.size()));
    DeviceArray<char> workspace(
        static_cast<int64_t>(cuda::softmax_gather_backward_workspace(G, tokens, E, K, by_expert)));
    cuda::softmax_gather_backward<T>(
        device_grad.data(), same_values.data(), device_logits.data(), device_indices.data(),
        same_high.data(), same_scale.data(), device_grad_logits.data(), G, tokens, E, K, by_expert,
        workspace.data(), nullptr);
    expect_near(device_grad_logits.values(), grad_logits, 16 * kRounding<T>);
  }

  static void expect_as_on_cpu(const Shape& shape) {
    auto logits = uniform<T>(shape.all() * shape.E, 3, -20, 20);
    for (size_t i = 0; i < logits.size(); i += 11) logits[i] = -kInf<T>;
    const auto places = static_cast<int32_t>(shape.places());
    // Some indices are invalid, and some are repeated.
    expect_as_on_cpu(shape, logits, integers(shape.size(), 4, -1, places));
  }
};
TYPED_TEST_SUITE(CudaSoftmaxGather, Floats);

TYPED_TEST(CudaSoftmaxGather, TokensChoose) {
  for (const int64_t E : {1, 4, 16, 17, 32, 60, 64, 100, 200, 511, 1024, 1500, 4096}) {
    for (const int64_t K : {0, 1, 2, 9, 40}) this->expect_as_on_cpu({2, 21, E, K, false});
  }
}

TYPED_TEST(CudaSoftmaxGather, ExpertsChoose) {
  for (const int64_t E : {1, 5, 32, 33, 130}) {
    for (const int64_t tokens : {1, 7, 50}) {
      for (const int64_t K : {0, 1, 6, 50}) this->expect_as_on_cpu({2, tokens, E, K, true});
    }
  }
  this->expect_as_on_cpu({1, 3, 1100, 2, true});
  this->expect_as_on_cpu({1, 2, 4096, 1, true});
  this->expect_as_on_cpu({2, 14000, 3, 40, true});  // invert_slots in several blocks
}

TYPED_TEST(CudaSoftmaxGather, EveryPickIsRepeated) {
  using T = TypeParam;
  for (const bool by_expert : {false, true}) {
    const Shape shape{1, 6, 6, 12, by_expert};
    std::vector<int32_t> indices(shape.size());
    for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int32_t>(i % 6);
    this->expect_as_on_cpu(shape, uniform<T>(36, 1), indices);
  }
}

TYPED_TEST(CudaSoftmaxGather, AbsentTokensNaNAndInfinity) {
  using T = TypeParam;
  const Shape shape{1, 4, 3, 3, false};
  const std::vector<T> logits{-kInf<T>, -kInf<T>, -kInf<T>, 1, kNaN<T>, 2,
                              1,        kInf<T>,  -kInf<T>, 7, 7,       -kInf<T>};
  this->expect_as_on_cpu(shape, logits, {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2});
  this->expect_as_on_cpu({1, 4, 3, 2, true}, logits, {0, 1, 2, 3, -1, -1});
}

TYPED_TEST(CudaSoftmaxGather, EmptyShapes) {
  for (const bool by_expert : {false, true}) {
    for (const Shape& shape :
         {Shape{0, 3, 4, 2, by_expert}, {2, 0, 4, 2, by_expert}, {2, 3, 0, 2, by_expert}}) {
      this->expect_as_on_cpu(shape);
    }
  }
}

}  // namespace
}  // namespace vmoe
