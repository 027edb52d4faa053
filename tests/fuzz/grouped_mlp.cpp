#include "grouped_mlp.h"

#include "cpu/filled_rows.h"
#include "cpu/product.h"
#include "input.h"

namespace vmoe {

// The element-wise steps, the matrix product between them, and the numbering of filled rows.
template <typename T>
void fuzz(Input& in, T) {
  const int64_t rows = in.integer(0, 20), columns = in.integer(0, 70), depth = in.integer(0, 40);
  const bool tanh = in.flag(), biased = in.flag();
  Block<T> x = in.values<T>(rows * columns), bias = in.values<T>(columns), out(rows * columns);
  Block<T> grad = in.values<T>(rows * columns), grad_bias(columns), sum(columns);
  const T* bias_or_null = biased ? bias.data() : nullptr;
  kernels::bias_gelu<T>(x, bias_or_null, out, rows, columns, columns, tanh);
  kernels::bias_gelu_backward<T>(
      x, bias_or_null, out, grad, grad_bias, rows, columns, columns, tanh);
  kernels::add_bias<T>(x, bias_or_null, out, rows, columns);
  kernels::add_rows<T>(x, sum, rows, columns);

  Block<T> a = in.values<T>(rows * depth), b = in.values<T>(depth * columns);
  const bool flip_a = in.flag(), flip_b = in.flag();
  const Matrix<const T> left =
      flip_a ? transposed<const T>(a, depth, rows) : matrix<const T>(a, rows, depth);
  const Matrix<const T> right =
      flip_b ? transposed<const T>(b, columns, depth) : matrix<const T>(b, depth, columns);
  kernels::product<T>(left, right, matrix<T>(out, rows, columns), in.flag());

  const int64_t E = in.integer(1, 4), G = in.integer(1, 4), C = in.integer(0, 9);
  Block<int32_t> filled = in.values<int32_t>(E * G);
  const FilledRows numbers(in.flag() ? filled.data() : nullptr, E, G, C);
  for (int64_t e = 0; e < E; ++e) {
    int64_t seen = 0, empty = 0;
    numbers.each_run(e, 0, numbers.count(e), [&](int64_t row, int64_t at, int64_t count) {
      expect(at == seen && row >= 0 && count > 0 && row + count <= G * C);
      seen += count;
    });
    numbers.each_gap(e, [&](int64_t row, int64_t count) {
      expect(row >= 0 && row + count <= G * C);
      empty += count;
    });
    expect(seen == numbers.count(e) && seen + empty == G * C);
  }
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
