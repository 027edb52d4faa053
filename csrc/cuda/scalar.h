// scalar -- multiply-add and exponential of scalars. They are arguments for the functions of
// common/, which CPU kernels call with vectors.
#pragma once

#include "../common/order.h"
#include "launch.h"

namespace vmoe::cuda {

struct Fused {
  VMOE_HOST_DEVICE float operator()(float a, float b, float c) const { return fmaf(a, b, c); }
  VMOE_HOST_DEVICE double operator()(double a, double b, double c) const { return fma(a, b, c); }
};

struct Exp {
  VMOE_HOST_DEVICE float operator()(float x) const { return expf(x); }
  VMOE_HOST_DEVICE double operator()(double x) const { return exp(x); }
};

}  // namespace vmoe::cuda
