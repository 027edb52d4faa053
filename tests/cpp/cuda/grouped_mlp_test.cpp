#include "grouped_mlp.h"

#include "device.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t E, G, C, columns;
  int64_t N() const { return G * C; }
  int64_t size() const { return E * N() * columns; }
};

template <typename Row>
class CudaGroupedMlp : public ::testing::Test {
 public:
  using T = Compute<Row>;
  // For double and float, the error bound of GELU in grouped_mlp.h times the largest |x| here. For
  // 16-bit types, the error of one rounding to 16 bits.
  static constexpr double kError = std::is_same_v<Row, double>     ? 8e-14
                                   : std::is_same_v<Row, float>    ? 8e-6
                                   : std::is_same_v<Row, BFloat16> ? 0x1p-8
                                                                   : 0x1p-11;

  struct Input {
    Shape shape;
    std::vector<int32_t> filled;  // [E, G], or empty: all rows are filled
    std::vector<Row> x, grad, bias;
  };

  static Input input(const Shape& shape, std::vector<int32_t> filled = {}, bool bias = true) {
    return {
        shape, std::move(filled), rows<Row>(shape.size(), 1), rows<Row>(shape.size(), 2),
        rows<Row>(bias ? shape.E * shape.columns : 0, 3)};
  }

  static bool is_filled(const Input& in, int64_t i) {
    const int64_t row = i / in.shape.columns, segment = row / in.shape.C;
    return in.filled.empty() || row % in.shape.C < in.filled[segment];
  }

  // Sets rows that are not filled to NaN. No NaN may appear in a result.
  static std::vector<Row> poisoned(const Input& in, std::vector<Row> values) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (!is_filled(in, static_cast<int64_t>(i))) memset(&values[i], 0xFF, sizeof(Row));
    }
    return values;
  }
  static std::vector<T> cleared(const Input& in, std::vector<T> values) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (!is_filled(in, static_cast<int64_t>(i))) values[i] = 0;
    }
    return values;
  }

  struct Wanted {
    std::vector<T> gelu, grad, grad_bias, biased, masked, sum;
  };

  static Wanted on_cpu(const Input& in, bool tanh) {
    const auto [E, G, C, columns] = in.shape;
    const int64_t N = G * C;
    const auto x = values_of(in.x), bias = values_of(in.bias);
    Wanted wanted{
        std::vector<T>(x.size()),
        cleared(in, values_of(in.grad)),
        std::vector<T>(E * columns),
        std::vector<T>(x.size()),
        cleared(in, x),
        std::vector<T>(E * columns)};
    for (int64_t e = 0; e < E; ++e) {
      const int64_t at = e * N * columns;
      const T* bias_of = bias.empty() ? nullptr : bias.data() + e * columns;
      cpu::add_bias(x.data() + at, bias_of, wanted.biased.data() + at, N, columns);
      cpu::add_rows(
          static_cast<const T*>(wanted.masked.data()) + at, wanted.sum.data() + e * columns, N,
          columns);
      cpu::bias_gelu_backward(
          x.data() + at, bias_of, wanted.gelu.data() + at, wanted.grad.data() + at,
          wanted.grad_bias.data() + e * columns, N, columns, columns, tanh);
    }
    wanted.gelu = cleared(in, wanted.gelu);
    wanted.biased = cleared(in, wanted.biased);
    return wanted;
  }

  // offset: the first row begins this many entries after an address that is a multiple of 16 bytes.
  static void expect_as_on_cpu(const Input& in, bool tanh, int64_t offset = 0) {
    const Shape& shape = in.shape;
    SCOPED_TRACE(
        ::testing::Message() << shape.E << " x " << shape.G << " x " << shape.C << " x "
                             << shape.columns << (tanh ? " tanh" : "") << " + " << offset);
    const Wanted wanted = on_cpu(in, tanh);
    DeviceArray<int32_t> filled(in.filled);
    DeviceArray<Row> bias(in.bias);
    const cuda::ExpertRows rows{
        in.filled.empty() ? nullptr : filled.data(), shape.E, shape.N(), shape.G};
    const Row* biases = in.bias.empty() ? nullptr : bias.data();
    const int64_t size = shape.size(), columns = shape.columns, of_weights = shape.E * columns;
    const auto shifted = [&](const std::vector<Row>& values) {
      std::vector<Row> out(offset);
      const auto poison = poisoned(in, values);
      out.insert(out.end(), poison.begin(), poison.end());
      return out;
    };
    const auto result = [&](const DeviceArray<Row>& array) {
      const auto values = values_of(array.values());
      return std::vector<T>(values.begin() + offset, values.end());
    };
    DeviceArray<Row> x(shifted(in.x)), out(offset + size);
    cuda::bias_gelu<Row>(
        x.data() + offset, biases, out.data() + offset, rows, columns, tanh, nullptr);
    expect_near(result(out), wanted.gelu, kError);

    DeviceArray<char> memory(static_cast<int64_t>(cuda::sum_workspace<Row>(rows, columns)));
    DeviceArray<Row> value(offset + size), grad(shifted(in.grad)), grad_bias(of_weights);
    cuda::bias_gelu_backward<Row>(
        x.data() + offset, biases, value.data() + offset, grad.data() + offset, grad_bias.data(),
        memory.data(), rows, columns, tanh, nullptr);
    expect_near(result(value), wanted.gelu, kError);
    expect_near(result(grad), wanted.grad, kError);
    expect_near(values_of(grad_bias.values()), wanted.grad_bias, 4 * kError);

    // The gradient of x without the gradient of the bias, and the forward in place.
    DeviceArray<Row> grad_again(shifted(in.grad)), same(shifted(in.x));
    cuda::bias_gelu_backward<Row>(
        x.data() + offset, biases, nullptr, grad_again.data() + offset, nullptr, nullptr, rows,
        columns, tanh, nullptr);
    expect_near(result(grad_again), result(grad), 0);
    cuda::bias_gelu<Row>(
        same.data() + offset, biases, same.data() + offset, rows, columns, tanh, nullptr);
    expect_near(result(same), result(out), 0);

    DeviceArray<Row> masked(offset + size), sum(of_weights), y(shifted(in.x));
    cuda::sum_rows<Row>(
        x.data() + offset, masked.data() + offset, sum.data(), memory.data(), rows, columns,
        nullptr);
    expect_near(result(masked), wanted.masked, 0);
    expect_near(values_of(sum.values()), wanted.sum, kError);
    cuda::add_bias<Row>(y.data() + offset, biases, rows, columns, nullptr);
    expect_near(result(y), wanted.biased, kError);
  }
};
TYPED_TEST_SUITE(CudaGroupedMlp, Rows);

// Rows are read in pieces of 16 bytes or entry by entry. The rows take less than one tile, exactly
// one tile, and several tiles.
TYPED_TEST(CudaGroupedMlp, AllRows) {
  for (const int64_t columns : {1, 3, 8, 33, 40, 256, 264}) {
    for (const int64_t N : {1, 5, 32, 33, 70}) {
      const auto in = this->input({2, 1, N, columns});
      this->expect_as_on_cpu(in, N % 2 == 0);
    }
  }
  for (const bool tanh : {false, true}) {
    this->expect_as_on_cpu(this->input({3, 1, 7, 24}, {}, false), tanh);
    this->expect_as_on_cpu(this->input({2, 1, 9, 40}), tanh, 1);  // misaligned: entry by entry
  }
}

TYPED_TEST(CudaGroupedMlp, SkipsRowsThatAreNotFilled) {
  for (const bool tanh : {false, true}) {
    this->expect_as_on_cpu(this->input({2, 3, 4, 16}, {4, 0, 2, 1, 3, 4}), tanh);
    // -1 and 9 are clamped to [0, 4].
    this->expect_as_on_cpu(this->input({2, 3, 4, 5}, {-1, 9, 2, 0, 0, 0}), tanh);
    this->expect_as_on_cpu(this->input({1, 40, 1, 8}, integers(40, 5, 0, 1)), tanh);
    this->expect_as_on_cpu(this->input({3, 2, 37, 48}, integers(6, 6, 0, 37), false), tanh);
    this->expect_as_on_cpu(this->input({2, 1, 300, 8}, {17, 290}), tanh);
  }
}

// Two experts with equal rows get equal sums, to the bit.
TYPED_TEST(CudaGroupedMlp, EqualExpertsGetEqualSums) {
  auto in = this->input({2, 1, 40, 16});
  const auto half = static_cast<int64_t>(in.x.size()) / 2;
  std::copy(in.x.begin(), in.x.begin() + half, in.x.begin() + half);
  DeviceArray<TypeParam> x(in.x), sum(32);
  const cuda::ExpertRows rows{nullptr, 2, 40, 1};
  DeviceArray<char> memory(static_cast<int64_t>(cuda::sum_workspace<TypeParam>(rows, 16)));
  cuda::sum_rows<TypeParam>(x.data(), nullptr, sum.data(), memory.data(), rows, 16, nullptr);
  const auto values = sum.values();
  expect_same(group(values, 0, 16), group(values, 1, 16));
}

TYPED_TEST(CudaGroupedMlp, EmptyShapes) {
  for (const Shape& shape : {Shape{0, 1, 4, 8}, {2, 1, 0, 8}, {2, 3, 0, 8}, {2, 1, 4, 0}}) {
    this->expect_as_on_cpu(this->input(shape), true);
  }
  this->expect_as_on_cpu(this->input({2, 2, 3, 8}, {0, 0, 0, 0}), false);
}

template <typename T>
class CudaGelu : public ::testing::Test {};
TYPED_TEST_SUITE(CudaGelu, Floats);

TYPED_TEST(CudaGelu, MatchesTheCpu) {
  using T = TypeParam;
  std::vector<T> x{0,        T(-0.0), kInf<T>, -kInf<T>, kNaN<T>,
                   T(1e-30), 1000,    -1000,   T(1e30),  T(-1e30)};
  for (int i = -500; i <= 500; ++i) x.push_back(T(i) * T(0.0244));
  const auto n = static_cast<int64_t>(x.size());
  const cuda::ExpertRows rows{nullptr, 1, 1, 1};
  for (const bool tanh : {false, true}) {
    std::vector<T> out(n), grad(n, 1);
    cpu::bias_gelu_backward(
        static_cast<const T*>(x.data()), static_cast<const T*>(nullptr), out.data(), grad.data(),
        static_cast<T*>(nullptr), 1, n, n, tanh);
    DeviceArray<T> device_x(x), device_out(n), device_grad(std::vector<T>(n, 1));
    cuda::bias_gelu_backward<T>(
        device_x.data(), nullptr, device_out.data(), device_grad.data(), nullptr, nullptr, rows, n,
        tanh, nullptr);
    const double error = sizeof(T) == 4 ? 1e-6 : 1e-14;
    expect_near(device_out.values(), out, error);
    expect_near(device_grad.values(), grad, error);
  }
}

}  // namespace
}  // namespace vmoe
