#include "../combine.h"

#include "tensor.h"

namespace vmoe {
namespace {

Tensor combine(
    const Tensor& y_, std::optional<Tensor> gate_, const Tensor& token, const Tensor& offsets_,
    const Tensor& slots_) {
  check_dim("combine", "y", y_, 4);
  check_dim("combine", "offsets", offsets_, 2);
  STD_TORCH_CHECK(offsets_.size(1) > 0, "combine: offsets has no entries, wanted T + 1");
  const Slots shape{y_.size(1), offsets_.size(1) - 1, y_.size(0), y_.size(2)};
  check_shape("combine", "token", token, {shape.G, shape.E, shape.C});
  check_shape("combine", "offsets", offsets_, {shape.G, shape.tokens + 1});
  check_shape("combine", "slots", slots_, {shape.G, shape.of_group()});
  check_dtype("combine", "token", token, ScalarType::Int);
  check_dtype("combine", "offsets", offsets_, ScalarType::Int);
  check_dtype("combine", "slots", slots_, ScalarType::Int);
  if (gate_) {
    check_shape("combine", "gate", *gate_, {shape.G, shape.E, shape.C});
    check_dtype("combine", "gate", *gate_, compute_dtype(y_));
  }
  const int64_t D = y_.size(3);
  const Tensor y = packed(y_), offsets = packed(offsets_), slots = packed(slots_);
  const std::optional<Tensor> gate = packed(gate_);
  Tensor out = empty({shape.G, shape.tokens, D}, y);
  by_row_dtype("combine", y, [&](auto zero) {
    using Row = decltype(zero);
    each_row(
        "combine", shape.all_tokens(), 2 * D, {y, gate.value_or(y), offsets, slots},
        [&](auto... where) {
          device::combine(
              read<Row>(y), gate ? read<Compute<Row>>(*gate) : nullptr, read<int32_t>(offsets),
              read<int32_t>(slots), write<Row>(out), shape, D, where...);
        });
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& grad_, const Tensor& y_, const Tensor& gate_, const Tensor& token_) {
  check_dim("combine_backward", "grad", grad_, 3);
  check_dim("combine_backward", "y", y_, 4);
  const Slots shape{grad_.size(0), grad_.size(1), y_.size(0), y_.size(2)};
  const int64_t D = grad_.size(2);
  check_shape("combine_backward", "y", y_, {shape.E, shape.G, shape.C, D});
  check_shape("combine_backward", "gate", gate_, {shape.G, shape.E, shape.C});
  check_shape("combine_backward", "token", token_, {shape.G, shape.E, shape.C});
  check_dtype("combine_backward", "y", y_, grad_.scalar_type());
  check_dtype("combine_backward", "gate", gate_, compute_dtype(y_));
  check_dtype("combine_backward", "token", token_, ScalarType::Int);
  const Tensor grad = packed(grad_), y = packed(y_), gate = packed(gate_);
  const Tensor token = packed(token_);
  Tensor grad_y = empty({shape.E, shape.G, shape.C, D}, y);
  Tensor grad_gate = empty({shape.G, shape.E, shape.C}, gate);
  by_row_dtype("combine_backward", y, [&](auto zero) {
    using Row = decltype(zero);
    each_row("combine_backward", shape.all(), 2 * D, {y, grad, gate, token}, [&](auto... where) {
      device::combine_backward(
          read<Row>(grad), read<Row>(y), read<Compute<Row>>(gate), read<int32_t>(token),
          write<Row>(grad_y), write<Compute<Row>>(grad_gate), shape, D, where...);
    });
  });
  return {grad_y, grad_gate};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace vmoe
