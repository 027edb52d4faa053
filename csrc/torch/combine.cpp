#include "../combine.h"

#include "tensor.h"

namespace vmoe {
namespace {

Tensor combine(
    const Tensor& y_, std::optional<Tensor> gate_, const Tensor& token, const Tensor& offsets_,
    const Tensor& slots_) {
  check_dim("combine", "y", y_, 4);
  check_dim("combine", "offsets", offsets_, 2);
  const int64_t E = y_.size(0), G = y_.size(1), C = y_.size(2), D = y_.size(3);
  const int64_t tokens = offsets_.size(1) - 1;
  STD_TORCH_CHECK(tokens >= 0, "combine: offsets has no entries, wanted T + 1");
  check_shape("combine", "token", token, {G, E, C});
  check_shape("combine", "offsets", offsets_, {G, tokens + 1});
  check_shape("combine", "slots", slots_, {G, E * C});
  check_dtype("combine", "token", token, ScalarType::Int);
  check_dtype("combine", "offsets", offsets_, ScalarType::Int);
  check_dtype("combine", "slots", slots_, ScalarType::Int);
  if (gate_) {
    check_shape("combine", "gate", *gate_, {G, E, C});
    check_dtype("combine", "gate", *gate_, compute_dtype(y_));
  }
  const Tensor y = packed(y_), offsets = packed(offsets_), slots = packed(slots_);
  const std::optional<Tensor> gate = gate_ ? std::optional(packed(*gate_)) : std::nullopt;
  Tensor out = empty({G, tokens, D}, y);
  by_row_dtype("combine", y, [&](auto zero) {
    using Row = decltype(zero);
    const Compute<Row>* gates = gate ? read<Compute<Row>>(*gate) : nullptr;
#ifdef VMOE_DEVICE_CUDA
    on_device("combine", y, {gate.value_or(y), offsets, slots}, [&](auto stream) {
      cuda::combine(
          read<Row>(y), gates, read<int32_t>(offsets), read<int32_t>(slots), write<Row>(out), G,
          tokens, E, C, D, stream);
    });
#else
    parallel(G * tokens, 2 * D, [&](int64_t begin, int64_t end) {
      cpu::combine(
          read<Row>(y), gates, read<int32_t>(offsets), read<int32_t>(slots), write<Row>(out), G,
          tokens, E, C, D, begin, end);
    });
#endif
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& grad_, const Tensor& y_, const Tensor& gate_, const Tensor& token_) {
  check_dim("combine_backward", "grad", grad_, 3);
  check_dim("combine_backward", "y", y_, 4);
  const int64_t G = grad_.size(0), tokens = grad_.size(1), D = grad_.size(2);
  const int64_t E = y_.size(0), C = y_.size(2);
  check_shape("combine_backward", "y", y_, {E, G, C, D});
  check_shape("combine_backward", "gate", gate_, {G, E, C});
  check_shape("combine_backward", "token", token_, {G, E, C});
  check_dtype("combine_backward", "y", y_, grad_.scalar_type());
  check_dtype("combine_backward", "gate", gate_, compute_dtype(y_));
  check_dtype("combine_backward", "token", token_, ScalarType::Int);
  const Tensor grad = packed(grad_), y = packed(y_), gate = packed(gate_);
  const Tensor token = packed(token_);
  Tensor grad_y = empty({E, G, C, D}, y);
  Tensor grad_gate = empty({G, E, C}, gate);
  by_row_dtype("combine_backward", y, [&](auto zero) {
    using Row = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("combine_backward", y, {grad, gate, token}, [&](auto stream) {
      cuda::combine_backward(
          read<Row>(grad), read<Row>(y), read<Compute<Row>>(gate), read<int32_t>(token),
          write<Row>(grad_y), write<Compute<Row>>(grad_gate), G, tokens, E, C, D, stream);
    });
#else
    parallel(E * G * C, 2 * D, [&](int64_t begin, int64_t end) {
      cpu::combine_backward(
          read<Row>(grad), read<Row>(y), read<Compute<Row>>(gate), read<int32_t>(token),
          write<Row>(grad_y), write<Compute<Row>>(grad_gate), G, tokens, E, C, D, begin, end);
    });
#endif
  });
  return {grad_y, grad_gate};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace vmoe
