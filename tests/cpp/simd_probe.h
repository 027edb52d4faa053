// simd_probe -- the functions of csrc/cpu/simd.h and half.h on plain pointers. Compiled once per
// ISA level like the kernels, so that the tests cover every level.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

namespace vmoe::cpu {

VMOE_EACH_ISA(

    void vector_bytes(int64_t* bytes);

    template <typename T> void exp_each(const T* x, T* out, int64_t n);

    template <typename T> void exp_negative_each(const T* x, T* out, int64_t n);

    // x are normal numbers. n is a multiple of the width.
    void log_each(const double* x, double* out, int64_t n);

    // n is a multiple of the width.
    void sqrt_each(const double* x, double* out, int64_t n);

    // The rounding error of each product. n is a multiple of the width.
    void product_error_each(const float* a, const float* b, float* out, int64_t n);

    // [width, width]
    template <typename T> void transpose_block(const T* x, T* out);

    // Compresses one vector: writes the entries that `chosen` (0 or 1) selects to `entries`, their
    // indices plus `first` to `places`, and `chosen` as `bits`. `entries` and `places` have room
    // for a whole vector.
    template <typename T> void compress_vector(
        const T* x, const int32_t* chosen, int32_t first, T* entries, int32_t* places,
        uint32_t* bits);

    // Loads and stores `count` < width entries. `all` gets the whole loaded vector.
    template <typename T> void copy_some(const T* x, int64_t count, T fill, T* all, T* out);

    // The sum of one vector's entries.
    template <typename T> void sum_vector(const T* x, T* out);

    // cpu/half.h, for BFloat16 and Float16.
    template <typename Half> void widen_each(const Half* x, float* out, int64_t n);
    template <typename Half> void narrow_each(const float* x, Half* out, int64_t n);

)

VMOE_BY_ISA(vector_bytes)
VMOE_BY_ISA(exp_each)
VMOE_BY_ISA(exp_negative_each)
VMOE_BY_ISA(log_each)
VMOE_BY_ISA(sqrt_each)
VMOE_BY_ISA(product_error_each)
VMOE_BY_ISA(transpose_block)
VMOE_BY_ISA(compress_vector)
VMOE_BY_ISA(copy_some)
VMOE_BY_ISA(sum_vector)
VMOE_BY_ISA(widen_each)
VMOE_BY_ISA(narrow_each)

}  // namespace vmoe::cpu
