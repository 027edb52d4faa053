#include "../dispatch.h"

#include "tensor.h"

namespace vmoe {
namespace {

// `offsets` and `slots` are not read here. The gradient of dispatch needs them, because it is a
// combine in which every gate is 1.
Tensor dispatch(
    const Tensor& x_, const Tensor& token_, const Tensor& offsets, const Tensor& slots) {
  check_dim("dispatch", "x", x_, 3);
  check_dim("dispatch", "token", token_, 3);
  const Slots shape{x_.size(0), x_.size(1), token_.size(1), token_.size(2)};
  check_shape("dispatch", "token", token_, {shape.G, shape.E, shape.C});
  check_shape("dispatch", "offsets", offsets, {shape.G, shape.tokens + 1});
  check_shape("dispatch", "slots", slots, {shape.G, shape.of_group()});
  check_dtype("dispatch", "token", token_, ScalarType::Int);
  check_dtype("dispatch", "offsets", offsets, ScalarType::Int);
  check_dtype("dispatch", "slots", slots, ScalarType::Int);
  const int64_t D = x_.size(2);
  const Tensor x = packed(x_), token = packed(token_);
  Tensor out = empty({shape.E, shape.G, shape.C, D}, x);
  each_row("dispatch", shape.all(), D, {x, token}, [&](auto... where) {
    device::dispatch(
        read<char>(x), read<int32_t>(token), write<char>(out), shape,
        D * static_cast<int64_t>(x.element_size()), where...);
  });
  return out;
}

}  // namespace

VMOE_REGISTER(m) { m.impl("dispatch", TORCH_BOX(&dispatch)); }

}  // namespace vmoe
