// product -- C = A B and C += A B, on the calling thread.
//
// The product is meant for loops over experts or groups. There the operands fit in a cache, and the
// next step reads the result from the cache. An entry of C is summed over k by multiply-adds, in
// parts of kDepth terms. The parts are added in order. So the bits of an entry depend only on its
// row of A and its column of B, not on addresses, other rows or the number of threads.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace vmoe {

// Non-owning matrix view. Entry (i, j) is data[i * down + j * along]. One of the two strides is 1.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t down, along;

  // Matrix<T> converts to Matrix<const T>, as T* converts to const T*.
  operator Matrix<const T>() const { return {data, rows, columns, down, along}; }
};

// A view of a matrix [rows, columns] whose rows are `stride` entries apart, or of the transpose
// [columns, rows].
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
        Matrix<T> out,      // [M, N]  contiguous rows; overlaps neither a nor b
        bool add);          // whether to add to out

)

VMOE_BY_ISA(product)

}  // namespace cpu

// out = a b.
template <typename T>
void multiply(Matrix<T> out, Matrix<const T> a, Matrix<const T> b) {
  cpu::product(a, b, out, false);
}

// out += a b, or out = a b if `first`: the first product of a sum.
template <typename T>
void multiply_add(Matrix<T> out, Matrix<const T> a, Matrix<const T> b, bool first = false) {
  cpu::product(a, b, out, !first);
}

}  // namespace vmoe
