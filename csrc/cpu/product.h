// product -- C = A B and C += A B, on the thread that calls.
//
// For loops over experts and groups, where an operand is small enough to stay in a cache and the next
// step takes the result from there. Every entry is one chain of multiply-adds over k, cut at
// multiples of kDepth and added up in order: its bits depend on its row and column alone, not
// on where they lie in memory, nor on the other rows, nor on the number of threads.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace vmoe {

// A matrix in the memory of somebody else; entry (i, j) is at data[i * down + j * along], and one of
// the two strides is 1.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t down, along;

  // As T* goes to const T*.
  operator Matrix<const T>() const { return {data, rows, columns, down, along}; }
};

// [rows, columns], rows `stride` apart, and its transpose [columns, rows].
template <typename T>
Matrix<T> matrix(T* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, rows, columns, stride, 1};
}
template <typename T>
Matrix<T> matrix(T* data, int64_t rows, int64_t columns) {
  return matrix(data, rows, columns, columns);
}
template <typename T>
Matrix<T> transposed(T* data, int64_t rows, int64_t columns, int64_t stride) {
  return {data, columns, rows, 1, stride};
}
template <typename T>
Matrix<T> transposed(T* data, int64_t rows, int64_t columns) {
  return transposed(data, rows, columns, columns);
}

namespace cpu {

VMOE_EACH_ISA(

    template <typename T> void product(
        Matrix<const T> a,  // [M, K]
        Matrix<const T> b,  // [K, N]
        Matrix<T> out,      // [M, N], rows packed; of its own memory
        bool add);          // to what is in out

)

VMOE_BY_ISA(product)

}  // namespace cpu

// out = a b.
template <typename T>
void multiply(Matrix<T> out, Matrix<const T> a, Matrix<const T> b) {
  cpu::product(a, b, out, false);
}

// out += a b; the first of several sums only writes.
template <typename T>
void multiply_add(Matrix<T> out, Matrix<const T> a, Matrix<const T> b, bool first = false) {
  cpu::product(a, b, out, !first);
}

}  // namespace vmoe
