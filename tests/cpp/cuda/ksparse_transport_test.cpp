#include "ksparse_transport.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, T, E;
  int64_t size() const { return G * T * E; }
};

template <typename T>
class CudaKsparseTransport : public ::testing::Test {
 public:
  static std::vector<T> on_cpu(
      const Shape& shape, const std::vector<T>& similarity, const TransportOptions& options) {
    std::vector<T> plan(shape.size());
    cpu::ksparse_transport(
        similarity.data(), plan.data(), shape.T, shape.E, options, 0, shape.G, Parallel{});
    return plan;
  }

  static std::vector<T> on_device(
      const Shape& shape, const std::vector<T>& similarity, const TransportOptions& options) {
    DeviceArray<T> device_similarity(similarity), plan(shape.size());
    DeviceArray<char> workspace(
        static_cast<int64_t>(
            cuda::ksparse_transport_workspace<T>(shape.G, shape.T, shape.E, options)));
    cuda::ksparse_transport(
        device_similarity.data(), plan.data(), shape.G, shape.T, shape.E, options, workspace.data(),
        nullptr);
    return plan.values();
  }

  static void expect_as_on_cpu(
      const Shape& shape, const std::vector<T>& similarity, const TransportOptions& options) {
    SCOPED_TRACE(
        ::testing::Message() << "G " << shape.G << " T " << shape.T << " E " << shape.E << " k "
                             << options.k << " I " << options.iterations
                             << (options.solver == Solver::kAdam ? " Adam" : " L-BFGS"));
    expect_near(
        on_device(shape, similarity, options), on_cpu(shape, similarity, options),
        std::max(kRounding<T>, 1e-9));
  }

  static TransportOptions adam(int64_t k, int64_t iterations) {
    return {k, iterations, Solver::kAdam, 0.01, 1e-3, 1.0};
  }
  static TransportOptions lbfgs(int64_t k, int64_t iterations) {
    return {k, iterations, Solver::kLbfgs, 0.01, 1e-9, 1.0};
  }
};
TYPED_TEST_SUITE(CudaKsparseTransport, Floats);

// Groups in shared memory, with one token, one expert, more experts than tokens, more experts than
// warps, and long columns.
TYPED_TEST(CudaKsparseTransport, GroupsInSharedMemory) {
  using T = TypeParam;
  for (const Shape& shape :
       {Shape{1, 1, 1},
        {1, 1, 3},
        {1, 5, 1},
        {2, 12, 4},
        {2, 30, 3},
        {1, 4, 40},
        {1, 196, 32},
        {1, 700, 5}}) {
    const auto similarity = uniform<T>(shape.size(), 1, 0, 1);
    for (const int64_t k : {int64_t{1}, int64_t{3}, shape.T / shape.E, shape.T / 2, shape.T}) {
      if (k < 1 || k > shape.T) continue;
      for (const int64_t iterations : {0, 1, 20}) {
        if (shape.size() > 1000 && iterations == 20 && k > shape.T / 8) continue;
        this->expect_as_on_cpu(shape, similarity, this->adam(k, iterations));
      }
      for (const int64_t iterations : {0, 1, 4}) {
        this->expect_as_on_cpu(shape, similarity, this->lbfgs(k, iterations));
      }
    }
  }
}

// Groups in device memory. Adam takes many launches, L-BFGS one block.
TYPED_TEST(CudaKsparseTransport, LargeGroups) {
  using T = TypeParam;
  const Shape many_experts{1, 40, 1500};
  this->expect_as_on_cpu(many_experts, uniform<T>(many_experts.size(), 1, 0, 1), this->adam(3, 1));
  const Shape shape{1, 2000, 29};
  const auto similarity = uniform<T>(shape.size(), 2, 0, 1);
  for (const int64_t k : {int64_t{1}, shape.T / 16 + 1, shape.T}) {
    this->expect_as_on_cpu(shape, similarity, this->adam(k, 3));
    this->expect_as_on_cpu(shape, similarity, this->lbfgs(k, 1));
  }
  this->expect_as_on_cpu(shape, similarity, this->adam(2, 0));
  auto bad = similarity;
  bad[shape.E + 1] = kNaN<T>;
  this->expect_as_on_cpu(shape, bad, this->adam(3, 2));
  bad[shape.E + 1] = -kInf<T>;
  std::fill(bad.begin() + 3 * shape.E, bad.begin() + 4 * shape.E, -kInf<T>);
  this->expect_as_on_cpu(shape, bad, this->adam(3, 2));
  this->expect_as_on_cpu(shape, bad, this->lbfgs(3, 1));
  this->expect_as_on_cpu(shape, std::vector<T>(shape.size(), -kInf<T>), this->adam(3, 2));
}

// Depending on the tolerance, the first gradient, a later gradient or no gradient meets it. A group
// must not stop when another group stops.
TYPED_TEST(CudaKsparseTransport, StopsAtTheTolerance) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{2, 12, 3}, {2, 2000, 29}}) {
    const int64_t size = shape.T * shape.E;
    auto similarity = uniform<T>(shape.size(), 3, 0, 1);
    for (int64_t i = 0; i < size; ++i) similarity[i] *= T{1} / 64;  // group 0 converges first
    TransportOptions options = this->adam(shape.T, 5);
    for (const double tolerance : {1e9, 1.0, 0.1, 0.0}) {
      options.tolerance = tolerance;
      this->expect_as_on_cpu(shape, similarity, options);
    }
  }
}

TYPED_TEST(CudaKsparseTransport, TiesGoToTheLowerIndex) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{1, 2, 2}, {2, 16, 4}, {1, 64, 8}}) {
    for (const int64_t k : {1, 2, 7}) {
      if (k > shape.T) continue;
      for (const auto& options : {this->adam(k, 0), this->adam(k, 1), this->lbfgs(k, 0)}) {
        this->expect_as_on_cpu(shape, tied<T>(shape.size(), 4), options);
        this->expect_as_on_cpu(shape, std::vector<T>(shape.size(), T{1}), options);
      }
    }
  }
}

TYPED_TEST(CudaKsparseTransport, AbsentTokensAndMaskedPairs) {
  using T = TypeParam;
  const Shape shape{2, 20, 3};
  auto similarity = uniform<T>(shape.size(), 5, 0, 1);
  for (int64_t i = 0; i < shape.size(); ++i) {
    if (i / 3 % 4 == 1) similarity[i] = -kInf<T>;
  }
  for (const int64_t k : {2, 15, 20}) {
    this->expect_as_on_cpu(shape, similarity, this->adam(k, 10));
    this->expect_as_on_cpu(shape, similarity, this->lbfgs(k, 3));
  }
  for (int64_t i = 0; i < shape.size(); i += 5) similarity[i] = -kInf<T>;
  // Expert 2 is unreachable.
  for (int64_t i = 2; i < shape.size(); i += 3) similarity[i] = -kInf<T>;
  for (const int64_t k : {2, 20}) {
    this->expect_as_on_cpu(shape, similarity, this->adam(k, 10));
    this->expect_as_on_cpu(shape, similarity, this->lbfgs(k, 3));
  }
}

TYPED_TEST(CudaKsparseTransport, OnlyBadGroupsAreNaN) {
  using T = TypeParam;
  const Shape shape{3, 6, 2};
  for (const T bad : {kNaN<T>, kInf<T>}) {
    auto similarity = uniform<T>(shape.size(), 6, 0, 1);
    similarity[15] = bad;
    for (const auto& options : {this->adam(3, 4), this->lbfgs(3, 3)}) {
      this->expect_as_on_cpu(shape, similarity, options);
    }
  }
}

TYPED_TEST(CudaKsparseTransport, ExtremeValues) {
  using T = TypeParam;
  const Shape shape{1, 6, 2};
  for (const double scale : {1e4, 1e-4, 0.0}) {
    this->expect_as_on_cpu(shape, uniform<T>(shape.size(), 7, -scale, scale), this->adam(3, 5));
  }
}

// With k = n the objective has no kinks, and both devices reach its only optimum.
TYPED_TEST(CudaKsparseTransport, LbfgsConverges) {
  using T = TypeParam;
  for (const Shape& shape : {Shape{1, 12, 3}, {1, 40, 4}, {1, 4, 8}}) {
    const auto similarity = uniform<T>(shape.size(), 8, 0, 2);
    expect_near(
        this->on_device(shape, similarity, this->lbfgs(shape.T, 500)),
        this->on_cpu(shape, similarity, this->lbfgs(shape.T, 500)), 1e-6);
  }
}

TYPED_TEST(CudaKsparseTransport, EmptyShapes) {
  for (const auto& options : {this->adam(0, 4), this->lbfgs(0, 4)}) {
    for (const Shape& shape : {Shape{0, 3, 4}, {2, 0, 4}, {2, 3, 0}, {2, 0, 0}}) {
      this->expect_as_on_cpu(shape, {}, options);
    }
    this->expect_as_on_cpu({1, 3, 2}, std::vector<TypeParam>(6, 1), options);
  }
}

}  // namespace
}  // namespace vmoe
