// soft_mix on CUDA -- the softmax and the product over all groups. For shapes that soft_mix_product
// takes, this kernel computes both. For other shapes our kernel computes the softmax, and torch
// computes the batched product.
#pragma once

#include "../../common/row_stride.h"
#include "../soft_mix.h"
#include "product.h"

namespace vmoe {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// Converts slots to rows and back. Slots [E, G, C, D] are in the order in which experts read them.
// Rows [G, S, D] are in the order in which products read them. If the distance between adjacent
// slots of a group is constant, the rows are a view of the slots. Otherwise the rows are a copy.
template <typename Row>
struct SlotRows {
  int64_t E, G, C, D;
  cudaStream_t stream;

  bool in_place() const { return E == 1 || G == 1 || C == 1; }

  // The rows of these slots.
  Tensor take(const Tensor& slots) const {
    if (in_place()) return view(slots);
    const Tensor rows = empty({G, E * C, D}, slots);
    cuda::soft_mix_rows(read<Row>(slots), write<Row>(rows), G, E, C, D, stream);
    return rows;
  }
  // Memory for rows that put() writes to these slots.
  Tensor room(const Tensor& slots) const {
    return in_place() ? view(slots) : empty({G, E * C, D}, slots);
  }
  // Writes the rows, which are in room(slots), to the slots.
  void put(const Tensor& rows, const Tensor& slots) const {
    if (in_place()) return;
    cuda::soft_mix_slots(read<Row>(rows), write<Row>(slots), G, E, C, D, stream);
  }

 private:
  Tensor view(const Tensor& slots) const {
    const std::array<int64_t, 3> sizes{G, E * C, D}, strides{C * D, C == 1 ? G * D : D, 1};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(slots.get(), 3, sizes.data(), strides.data(), 0, &handle));
    return Tensor(handle);
  }
};

// Memory for the weights [G, T, S], whose rows are aligned to 16 bytes (common/row_stride.h).
template <typename Row>
Tensor empty_weights(const SoftMix& mix) {
  Tensor weights = empty({mix.G, mix.tokens, row_stride<Row>(mix.S())}, mix.values);
  return narrow(weights, 2, 0, mix.S());
}

void run_forward(const SoftMix& mix, const Tensor& out) {
  by_row_dtype("soft_mix", mix.values, [&](auto zero) {
    using Row = decltype(zero);
    on_device("soft_mix", mix.logits, {mix.values}, [&](auto stream) {
      if constexpr (kHalf<Row>) {
        if (cuda::soft_mix_product(
                read<float>(mix.logits), read<Row>(mix.values), write<Row>(out), mix.G, mix.tokens,
                mix.E, mix.C, mix.D, mix.over_tokens, stream)) {
          return;
        }
      }
      const SlotRows<Row> slots{mix.E, mix.G, mix.C, mix.D, stream};
      const Tensor weights = empty_weights<Row>(mix);
      cuda::soft_mix(
          read<Compute<Row>>(mix.logits), write<Row>(weights), mix.G, mix.tokens, mix.S(),
          mix.over_tokens, stream);
      if (mix.over_tokens) {
        const Tensor rows = slots.room(out);
        multiply(rows, transpose(weights, 1, 2), mix.values);
        slots.put(rows, out);
      } else {
        multiply(out, weights, slots.take(mix.values));
      }
    });
  });
}

void run_backward(
    const SoftMix& mix, const Tensor& grad, const Tensor& grad_logits, const Tensor& grad_values) {
  const Tensor& by_token = mix.over_tokens ? mix.values : grad;
  const Tensor& by_slot = mix.over_tokens ? grad : mix.values;
  by_row_dtype("soft_mix_backward", mix.values, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_mix_backward", mix.logits, {grad, mix.values}, [&](auto stream) {
      const SlotRows<Row> slots{mix.E, mix.G, mix.C, mix.D, stream};
      const Tensor rows = slots.take(by_slot);
      multiply(grad_logits, by_token, transpose(rows, 1, 2));
      const Tensor weights = empty_weights<Row>(mix);
      cuda::soft_mix_backward(
          read<T>(mix.logits), write<Row>(weights), write<T>(grad_logits), mix.G, mix.tokens,
          mix.S(), mix.over_tokens, stream);
      if (mix.over_tokens) {
        multiply(grad_values, weights, rows);
      } else {
        const Tensor grads = slots.room(grad_values);
        multiply(grads, transpose(weights, 1, 2), by_token);
        slots.put(grads, grad_values);
      }
    });
  });
}

}  // namespace
}  // namespace vmoe
