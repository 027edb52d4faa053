// half -- the 16-bit floating-point types, as bits. Rows may be stored in these types. Kernels
// compute in float.
#pragma once

#include <cstdint>

namespace vmoe {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
struct ComputeOf {
  using type = T;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};

// The type in which rows of T are computed: double for double, else float.
template <typename T>
using Compute = typename ComputeOf<T>::type;

// Whether T has 16 bits.
template <typename T>
constexpr bool kHalf = sizeof(T) < sizeof(Compute<T>);

// Expands to instantiate(Row) for every type in which rows are stored.
#define VMOE_EACH_ROW(instantiate)                                                                 \
  instantiate(float) instantiate(double) instantiate(BFloat16) instantiate(Float16)

}  // namespace vmoe
