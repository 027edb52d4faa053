#include "sinkhorn.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E;
  int64_t size() const { return G * T * E; }
};

struct Options {
  int64_t iterations = 20;
  double epsilon = 1;
  double tolerance = 0;
};

// Tolerance for results that are summed in another order than on the CPU. Numbers around 1e4
// cancel, so the tolerance is 1e-11 for float64.
template <typename T>
constexpr double kOtherOrder = std::max(4 * kRounding<T>, 1e-11);

template <typename T>
class CudaSinkhorn : public ::testing::Test {
 public:
  struct Result {
    std::vector<T> plan;
    std::vector<double> history, error;
    std::vector<int32_t> steps;
  };

  static Result on_cpu(const Shape& shape, const std::vector<T>& logits, const Options& options) {
    Result out{
        std::vector<T>(shape.size()), std::vector<double>(shape.G * options.iterations * shape.E),
        std::vector<double>(shape.G), std::vector<int32_t>(shape.G)};
    cpu::sinkhorn(
        logits.data(), out.plan.data(), out.history.data(), out.error.data(), out.steps.data(),
        shape.T, shape.E, options.iterations, options.epsilon, options.tolerance, 0, shape.G,
        Parallel{});
    return out;
  }

  static Result on_device(
      const Shape& shape, const std::vector<T>& logits, const Options& options) {
    DeviceArray<T> device_logits(logits), plan(shape.size());
    DeviceArray<double> history(shape.G * options.iterations * shape.E), error(shape.G);
    DeviceArray<int32_t> steps(shape.G);
    DeviceArray<char> workspace(
        static_cast<int64_t>(cuda::sinkhorn_workspace<T>(shape.G, shape.T, shape.E)));
    cuda::sinkhorn(
        device_logits.data(), plan.data(), history.data(), error.data(), steps.data(), shape.G,
        shape.T, shape.E, options.iterations, options.epsilon, options.tolerance, workspace.data(),
        nullptr);
    return {plan.values(), history.values(), error.values(), steps.values()};
  }

  static std::vector<T> backward_on_device(
      const Shape& shape, const std::vector<T>& grad, const std::vector<T>& logits,
      const std::vector<double>& history, const std::vector<int32_t>& steps,
      const Options& options) {
    DeviceArray<T> device_grad(grad), device_logits(logits), out(shape.size());
    DeviceArray<double> device_history(history);
    DeviceArray<int32_t> device_steps(steps);
    DeviceArray<char> workspace(
        static_cast<int64_t>(cuda::sinkhorn_backward_workspace<T>(shape.G, shape.T, shape.E)));
    cuda::sinkhorn_backward(
        device_grad.data(), device_logits.data(), device_history.data(), device_steps.data(),
        out.data(), shape.G, shape.T, shape.E, options.iterations, options.epsilon,
        workspace.data(), nullptr);
    return out.values();
  }

  static void expect_backward_as_on_cpu(
      const Shape& shape, const std::vector<T>& logits, const Result& forward,
      const Options& options) {
    const auto grad = uniform<T>(shape.size(), 91);
    std::vector<T> wanted(shape.size());
    cpu::sinkhorn_backward(
        grad.data(), logits.data(), forward.history.data(), forward.steps.data(), wanted.data(),
        shape.T, shape.E, options.iterations, options.epsilon, 0, shape.G, Parallel{});
    expect_near(
        backward_on_device(shape, grad, logits, forward.history, forward.steps, options), wanted,
        kOtherOrder<T>);
  }

  static void expect_implicit_as_on_cpu(
      const Shape& shape, const std::vector<T>& plan, double epsilon) {
    const auto grad = uniform<T>(shape.size(), 92);
    std::vector<T> wanted(shape.size());
    cpu::sinkhorn_implicit_backward(
        grad.data(), plan.data(), wanted.data(), shape.T, shape.E, epsilon, 0, shape.G, Parallel{});
    DeviceArray<T> device_grad(grad), device_plan(plan), out(shape.size());
    DeviceArray<char> workspace(
        static_cast<int64_t>(
            cuda::sinkhorn_implicit_backward_workspace<T>(shape.G, shape.T, shape.E)));
    cuda::sinkhorn_implicit_backward(
        device_grad.data(), device_plan.data(), out.data(), shape.G, shape.T, shape.E, epsilon,
        workspace.data(), nullptr);
    expect_near(out.values(), wanted, std::max(kRounding<T>, 1e-9));
  }

  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<T>& logits, const Options& options = {}) {
    SCOPED_TRACE(
        ::testing::Message() << "G " << shape.G << " T " << shape.T << " E " << shape.E << " I "
                             << options.iterations << " epsilon " << options.epsilon);
    const Result wanted = on_cpu(shape, logits, options);
    const Result actual = on_device(shape, logits, options);
    EXPECT_EQ(actual.steps, wanted.steps);
    expect_near(actual.plan, wanted.plan, kOtherOrder<T>);
    expect_near(actual.history, wanted.history, kOtherOrder<T>);
    expect_near(actual.error, wanted.error, kOtherOrder<T>);
    expect_backward_as_on_cpu(shape, logits, wanted, options);
  }
};
TYPED_TEST_SUITE(CudaSinkhorn, Floats);

// One block per group. The shapes have one token, one expert, more experts than tokens, and some
// lanes or a whole warp per row.
TYPED_TEST(CudaSinkhorn, OneBlockPerGroup) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1},
        {2, 7, 3},
        {3, 4, 8},
        {1, 1, 5},
        {1, 6, 1},
        {2, 33, 16},
        {1, 5, 70},
        {1, 2, 700},
        {1, 8, 4096},
        {2, 196, 32},
        {1, 300, 33}}) {
    for (const int64_t iterations : {1, 2, 20}) {
      if (shape.size() > 1000 && iterations == 2) continue;
      for (const double epsilon : {0.5, 2.0}) {
        this->expect_as_on_cpu(shape, uniform<T>(shape.size(), 1), {iterations, epsilon, 0});
      }
    }
  }
}

// In the backward at least, every group exceeds the shared memory of a block. So several blocks
// compute a group, except in {2, 3, 10000}. There the column vectors exceed shared memory too, and
// one block computes each group of three tokens.
TYPED_TEST(CudaSinkhorn, SeveralBlocksPerGroup) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 2100, 32}, {1, 1200, 32}, {2, 200, 301}, {2, 3, 10000}, {1, 9000, 7}}) {
    this->expect_as_on_cpu(shape, uniform<T>(shape.size(), 2), {3, 1, 0});
  }
  for (const Shape& shape : {Shape{1, 1200, 32}, {1, 200, 301}}) {
    this->expect_as_on_cpu(shape, uniform<T>(shape.size(), 3), {1, 1, 0});
    this->expect_as_on_cpu(shape, uniform<T>(shape.size(), 4, -300, 300), {2, 1, 0});
  }
}

#ifdef VMOE_SHIM
class SmallDevice {
 public:
  SmallDevice(int multiprocessors, size_t shared_limit) {
    shim::multiprocessors = multiprocessors;
    shim::shared_limit = shared_limit;
  }
  ~SmallDevice() {
    shim::multiprocessors = multiprocessors_before_;
    shim::shared_limit = shared_limit_before_;
  }

 private:
  int multiprocessors_before_ = shim::multiprocessors;
  size_t shared_limit_before_ = shim::shared_limit;
};

// The devices have little shared memory and few multiprocessors, so that small shapes cover: one
// and several blocks per group; matrices in shared and in device memory; one and several groups per
// crew (the blocks that compute a group together); and more blocks than are needed. A device leaves
// out a shape that another device divides in the same way.
TYPED_TEST(CudaSinkhorn, OnSmallDevices) {
  using T = TypeParam;
  const Shape one_group{1, 700, 9}, wide{3, 300, 33}, groups{5, 260, 17}, long_rows{2, 70, 520};
  for (const auto& [multiprocessors, shared_kib, shapes] :
       {std::tuple{2, 25, std::vector{one_group, wide, groups, long_rows}},
        {5, 32, {one_group, long_rows}},
        {7, 48, {one_group, wide, groups}}}) {
    const SmallDevice device(multiprocessors, size_t(shared_kib) << 10);
    for (const Shape& shape : shapes) {
      SCOPED_TRACE(
          ::testing::Message() << multiprocessors << " multiprocessors with " << shared_kib
                               << " KiB");
      auto some_masked = uniform<T>(shape.size(), 12);
      if (shape.G == groups.G) this->expect_as_on_cpu(shape, some_masked, {2, 1, 0});
      for (int64_t i = 0; i < shape.size(); ++i) {
        const int64_t t = i / shape.E % shape.T;
        if (t % 3 == 1 || t < shape.T / 4) some_masked[i] = -kInf<T>;
      }
      this->expect_as_on_cpu(shape, some_masked, {3, 0.5, 1e-2});
      const Shape one{1, shape.T, shape.E};
      this->expect_as_on_cpu(one, uniform<T>(one.size(), 13, -300, 300), {2, 1, 0});
    }
  }
}

TYPED_TEST(CudaSinkhorn, BitsDoNotDependOnTheSchedule) {
  using T = TypeParam;
  const SmallDevice device(5, 34 << 10);
  const shim::Schedule before = shim::schedule;
  const Shape shape{3, 330, 21};
  const Options options{6, 1, 1e-3};
  for (const double spread : {1.0, 300.0}) {
    const auto logits = uniform<T>(shape.size(), 14, -spread, spread);
    const auto grad = uniform<T>(shape.size(), 15);
    const auto run = [&](shim::Schedule schedule) {
      shim::schedule = schedule;
      auto out = this->on_device(shape, logits, options);
      return std::pair{
          out, this->backward_on_device(shape, grad, logits, out.history, out.steps, options)};
    };
    const auto [wanted, wanted_grad] = run(shim::Schedule::kForward);
    for (const auto schedule : {shim::Schedule::kBackward, shim::Schedule::kShuffled}) {
      const auto [actual, actual_grad] = run(schedule);
      expect_same(actual.plan, wanted.plan);
      expect_same(actual.history, wanted.history);
      expect_same(actual.error, wanted.error);
      expect_same(actual.steps, wanted.steps);
      expect_same(actual_grad, wanted_grad);
    }
  }
  shim::schedule = before;
}
#endif

// The wider the logits, the more often the iteration must use float64 or logarithms.
TYPED_TEST(CudaSinkhorn, WideLogits) {
  using T = TypeParam;
  const Shape shape{2, 21, 5};
  for (const double spread : {39.0, 41.0, 150.0, 199.0, 201.0, 1e3, 1e4}) {
    for (const int64_t iterations : {1, 3, 20}) {
      auto logits = uniform<T>(shape.size(), 5, 0, spread);
      logits[3] = 0;
      logits[30] = static_cast<T>(spread);
      this->expect_as_on_cpu(shape, logits, {iterations, 1, 0});
    }
  }
  const Shape one{1, 8, 4};
  std::vector<T> hard(one.size(), -T{1e4});
  for (int64_t t = 0; t < one.T; ++t) hard[t * 4 + t % 4] = T{1e4};
  this->expect_as_on_cpu(one, hard);
  this->expect_as_on_cpu(one, std::vector<T>(one.size(), T{-1e4}));
}

TYPED_TEST(CudaSinkhorn, StopsAtTheTolerance) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{3, 12, 4}, {2, 2100, 32}}) {
    const int64_t size = shape.T * shape.E;
    auto logits = uniform<T>(shape.size(), 6);
    std::fill(logits.begin() + size, logits.begin() + 2 * size, T{0});  // converges in one step
    for (const double tolerance : {1e-1, 1e-3, 1e-6}) {
      if (size > 1000 && tolerance != 1e-1) continue;
      this->expect_as_on_cpu(shape, logits, {size > 1000 ? 5 : 40, 1, tolerance});
    }
  }
}

TYPED_TEST(CudaSinkhorn, AbsentTokensAndMaskedPairs) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{1, 7, 3}, {2, 40, 6}, {1, 9000, 7}}) {
    const Options options{shape.T > 1000 ? 3 : 20, 1, 0};
    auto logits = uniform<T>(shape.size(), 7);
    for (int64_t i = 0; i < shape.size(); ++i) {
      if (i / shape.E % 3 == 1) logits[i] = -kInf<T>;
    }
    this->expect_as_on_cpu(shape, logits, options);
    if (shape.T > 1000) continue;
    for (int64_t i = 0; i < shape.size(); i += 5) logits[i] = -kInf<T>;
    this->expect_as_on_cpu(shape, logits, options);
    // Expert 1 is unreachable.
    for (int64_t i = 1; i < shape.size(); i += shape.E) logits[i] = -kInf<T>;
    this->expect_as_on_cpu(shape, logits, options);
    for (const double tolerance : {0.0, 1e-3}) {
      this->expect_as_on_cpu(
          shape, std::vector<T>(shape.size(), -kInf<T>), {options.iterations, 1, tolerance});
    }
  }
}

TYPED_TEST(CudaSinkhorn, OnlyBadGroupsAreNaN) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{3, 5, 3}, {2, 9000, 7}}) {
    const int64_t size = shape.T * shape.E;
    for (const T bad : {kNaN<T>, kInf<T>}) {
      for (const int64_t iterations : {1, 2}) {
        if (shape.T > 1000 && iterations == 1) continue;
        auto logits = uniform<T>(shape.size(), 8);
        logits[size + 4] = bad;
        const auto wanted = this->on_cpu(shape, logits, {iterations, 1, 0});
        const auto actual = this->on_device(shape, logits, {iterations, 1, 0});
        expect_near(actual.plan, wanted.plan, kOtherOrder<T>);
        expect_near(actual.error, wanted.error, kOtherOrder<T>);
        EXPECT_TRUE(all_nan(group(actual.plan, 1, size)));
        EXPECT_FALSE(std::isnan(actual.plan[0]));
      }
    }
  }
}

TYPED_TEST(CudaSinkhorn, GradientOfABadGroupIsNaN) {
  using T = TypeParam;
  const Shape shape{2, 5, 3};
  for (const T bad : {kNaN<T>, kInf<T>}) {
    auto logits = uniform<T>(shape.size(), 16);
    logits[17] = bad;
    const Options options{3, 1, 0};
    const auto forward = this->on_device(shape, logits, options);
    const auto actual = this->backward_on_device(
        shape, uniform<T>(shape.size(), 17), logits, forward.history, forward.steps, options);
    EXPECT_TRUE(all_nan(group(actual, 1, 15))) << bad;
    EXPECT_FALSE(std::isnan(actual[0]));
  }
}

// The rows of the plan sum to 1 even if a logit plus log_sum rounds to the logit.
TYPED_TEST(CudaSinkhorn, RowsOfLargeEqualLogitsSumToOne) {
  using T = TypeParam;
  const Shape shape{1, 6, 3};
  for (const double size : {1e10, 1e15, 1e16, 1e30}) {
    for (const bool by_column : {false, true}) {
      std::vector<T> logits(shape.size(), 0);
      for (int64_t i = 0; i < shape.size(); ++i) {
        if (by_column ? i % 3 == 0 : i < 9) logits[i] = static_cast<T>(size);
      }
      const auto actual = this->on_device(shape, logits, {});
      for (int64_t t = 0; t < shape.T; ++t) {
        double sum = 0;
        for (int64_t e = 0; e < shape.E; ++e) sum += actual.plan[t * shape.E + e];
        EXPECT_NEAR(sum, 1, kRounding<T>) << size;
      }
      EXPECT_TRUE(by_column || actual.error[0] <= kRounding<T>) << actual.error[0];
    }
  }
}

// `steps` is clamped to [0, iterations], so that history is not read out of bounds.
TYPED_TEST(CudaSinkhorn, BackwardClampsSteps) {
  using T = TypeParam;
  const Shape shape{2, 6, 3};
  const auto logits = uniform<T>(shape.size(), 9), grad = uniform<T>(shape.size(), 10);
  const auto forward = this->on_cpu(shape, logits, {4, 1, 0});
  const auto with = [&](int32_t a, int32_t b) {
    return this->backward_on_device(shape, grad, logits, forward.history, {a, b}, {4, 1, 0});
  };
  expect_same(with(4, 9), with(INT32_MAX, 4));
  expect_same(with(-1, 0), with(0, INT32_MIN));
  std::vector<T> wanted(shape.size());
  const std::vector<int32_t> none{0, 0};
  cpu::sinkhorn_backward(
      grad.data(), logits.data(), forward.history.data(), none.data(), wanted.data(), shape.T,
      shape.E, 4, 1.0, 0, shape.G, Parallel{});
  expect_near(with(0, 0), wanted, kOtherOrder<T>);
}

// The shapes cover systems in shared and in device memory, and groups whose tokens are divided into
// several pieces and several splits (sinkhorn_system.h).
TYPED_TEST(CudaSinkhorn, ImplicitBackward) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{2, 5, 3},
        {1, 8, 4},
        {1, 1, 3},
        {1, 4, 1},
        {1, 3, 6},
        {2, 196, 32},
        {1, 1300, 33},
        {1, 100, 170},
        {2, 10, 170}}) {
    SCOPED_TRACE(::testing::Message() << "T " << shape.T << " E " << shape.E);
    auto logits = uniform<T>(shape.size(), 11, -1, 1);
    const auto plan = this->on_cpu(shape, logits, {50, 1, 0}).plan;
    this->expect_implicit_as_on_cpu(shape, plan, 0.5);
    for (int64_t i = 0; i < shape.size(); ++i) {
      if (shape.T > 4 && i / shape.E % 3 == 1) logits[i] = -kInf<T>;
    }
    this->expect_implicit_as_on_cpu(shape, this->on_cpu(shape, logits, {50, 1, 0}).plan, 2);
    this->expect_implicit_as_on_cpu(shape, std::vector<T>(shape.size(), 0), 1);
    this->expect_implicit_as_on_cpu(shape, std::vector<T>(shape.size(), kNaN<T>), 1);
  }
}

TYPED_TEST(CudaSinkhorn, EmptyShapes) {
  for (const Shape& shape : {Shape{0, 3, 4}, {2, 0, 4}, {2, 3, 0}, {2, 0, 0}}) {
    for (const double tolerance : {0.0, 1e-2}) {
      this->expect_as_on_cpu(shape, {}, {5, 1, tolerance});
    }
    this->expect_implicit_as_on_cpu(shape, {}, 1);
  }
}

}  // namespace
}  // namespace vmoe
