// tensor_core -- PTX instructions: products on tensor cores, loads of their operands from shared
// memory, and asynchronous copies to shared memory.
//
// One instruction multiplies a [16, 16] by b [16, 8], which have 16-bit entries, and adds the
// product to sums [16, 8] in float32. A whole warp executes the instruction, and its lanes hold the
// operands. Each operand consists of 8 x 8 matrices. Operand a has four matrices: upper left, lower
// left, upper right, lower right. Operand b has two matrices, upper and lower, each transposed. The
// sums have two matrices, upper and lower. Lane 4 * row + pair holds the entries 2 * pair and 2 *
// pair + 1 of row `row` of each matrix. (PTX ISA, "Matrix Fragments for mma.m16n8k16".)
#pragma once

#include "half.h"

namespace vmoe::cuda {

#ifdef __CUDACC__
// An address in shared memory. A Shared has 32 bits, so it takes half as many registers as a
// pointer.
using Shared = uint32_t;
__device__ inline Shared shared_place(const void* at) {
  return static_cast<Shared>(__cvta_generic_to_shared(at));
}

// Starts an asynchronous copy of 16 bytes from device memory. If not `valid`, the copy writes zeros
// and does not read `from`.
__device__ inline void copy_async(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Commits this thread's copies since the last commit as one group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of copies of this thread except the last kPending groups. Other threads see
// the copies after a barrier.
template <int kPending>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit entries. Lanes 8 i to 8 i + 7 pass the addresses of the eight
// rows of matrix i.
__device__ inline void load_matrices(uint32_t (&to)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// The same as load_matrices, with each matrix transposed.
__device__ inline void load_transposed(uint32_t (&to)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// sums += a b.
template <typename Row>
__device__ void multiply_add(
    float (&sums)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower);
#define VMOE_MULTIPLY_ADD(Row, type)                                                               \
  template <>                                                                                      \
  __device__ inline void multiply_add<Row>(                                                        \
      float (&sums)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                            \
                 ".f32 "                                                                           \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));        \
  }
VMOE_MULTIPLY_ADD(BFloat16, "bf16")
VMOE_MULTIPLY_ADD(Float16, "f16")
#undef VMOE_MULTIPLY_ADD
#else
using shim::commit_copies;
using shim::copy_async;
using shim::load_matrices;
using shim::load_transposed;
using Shared = char*;
inline Shared shared_place(void* at) { return static_cast<char*>(at); }

template <int kPending>
void await_copies() {
  shim::await_copies(kPending);
}
template <typename Row>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower) {
  shim::multiply_add(sums, a, b_upper, b_lower, [](uint16_t bits) { return widen(Row{bits}); });
}
#endif

}  // namespace vmoe::cuda
