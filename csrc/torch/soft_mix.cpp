#include "../soft_mix.h"

#include <cstring>

#include "product.h"

namespace vmoe {
namespace {

// The slots lie as the experts take them, [E, G, C, D]; a group's products take them in one
// piece, [S, D]. Copied by the thread that multiplies them they need no tensor between.
template <typename T>
struct Slots {
  int64_t E, G, C, D;

  void take(const T* slots, int64_t g, T* rows) const {
    each(g, [&](int64_t from, int64_t to) { memcpy(rows + to, slots + from, C * D * sizeof(T)); });
  }
  void put(const T* rows, int64_t g, T* slots) const {
    each(g, [&](int64_t to, int64_t from) { memcpy(slots + to, rows + from, C * D * sizeof(T)); });
  }

 private:
  // body(offset in the slots, offset in the rows) for each expert's.
  template <typename Body>
  void each(int64_t g, Body&& body) const {
    if (C * D == 0) return;
    for (int64_t e = 0; e < E; ++e) body((e * G + g) * C * D, e * C * D);
  }
};

void check(
    const char* op, const Tensor& logits, const Tensor& values, int64_t dim, int64_t num_experts) {
  check_dim(op, "logits", logits, 3);
  STD_TORCH_CHECK(dim == 1 || dim == 2, op, ": dim = ", dim);
  const int64_t G = logits.size(0), S = logits.size(2), E = num_experts;
  STD_TORCH_CHECK(E >= 1 && S % E == 0, op, ": ", S, " slots of ", E, " experts");
  check_dim(op, "values", values, dim == 1 ? 3 : 4);
  if (dim == 1) {
    check_shape(op, "values", values, {G, logits.size(1), values.size(2)});
  } else {
    check_shape(op, "values", values, {E, G, S / E, values.size(3)});
  }
  check_dtype(op, "values", values, logits.scalar_type());
}

Tensor soft_mix(
    const Tensor& logits_in, const Tensor& values_in, int64_t dim, int64_t num_experts) {
  check("soft_mix", logits_in, values_in, dim, num_experts);
  const Tensor logits = packed(logits_in), values = packed(values_in);
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2);
  const int64_t D = values.size(values.dim() - 1), C = S / num_experts;
  Tensor out = dim == 1 ? empty({num_experts, G, C, D}, logits) : empty({G, tokens, D}, logits);
  by_dtype("soft_mix", logits, [&](auto zero) {
    using T = decltype(zero);
    const Slots<T> slots{num_experts, G, C, D};
    parallel_products(G, 4 * tokens * S, [&](int64_t begin, int64_t end) {
      const auto weights = scratch<T>(tokens * S), rows = scratch<T>(S * D);
      const Tensor slot_rows = matrix(rows.get(), S, D);
      for (int64_t g = begin; g < end; ++g) {
        cpu::soft_mix(read<T>(logits) + g * tokens * S, weights.get(), tokens, S, dim == 1, 0, 1);
        if (dim == 1) {
          const T* x = read<T>(values) + g * tokens * D;
          multiply(slot_rows, transposed(weights.get(), tokens, S), matrix(x, tokens, D));
          slots.put(rows.get(), g, write<T>(out));
        } else {
          T* y = write<T>(out) + g * tokens * D;
          slots.take(read<T>(values), g, rows.get());
          multiply(matrix(y, tokens, D), matrix(weights.get(), tokens, S), slot_rows);
        }
      }
    });
  });
  return out;
}

// Backward holds logits and values, which the caller has anyway; the weights are made again.
// Not so the logits: that would be a product of T * S * D multiply-adds for every T * S
// numbers read, a third of the forward's work each time.
std::tuple<Tensor, Tensor> soft_mix_backward(
    const Tensor& grad_in, const Tensor& logits_in, const Tensor& values_in, int64_t dim,
    int64_t num_experts) {
  check("soft_mix_backward", logits_in, values_in, dim, num_experts);
  const Tensor grad = packed(grad_in), logits = packed(logits_in), values = packed(values_in);
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2);
  const int64_t D = values.size(values.dim() - 1), C = S / num_experts;
  if (dim == 1) {
    check_shape("soft_mix_backward", "grad", grad, {num_experts, G, C, D});
  } else {
    check_shape("soft_mix_backward", "grad", grad, {G, tokens, D});
  }
  check_dtype("soft_mix_backward", "grad", grad, logits.scalar_type());
  Tensor grad_logits = empty({G, tokens, S}, logits);
  Tensor grad_values =
      dim == 1 ? empty({G, tokens, D}, logits) : empty({num_experts, G, C, D}, logits);
  by_dtype("soft_mix_backward", logits, [&](auto zero) {
    using T = decltype(zero);
    const Slots<T> slots{num_experts, G, C, D};
    const Tensor& by_token = dim == 1 ? values : grad;
    const Tensor& by_slot = dim == 1 ? grad : values;
    parallel_products(G, 6 * tokens * S, [&](int64_t begin, int64_t end) {
      const auto weights = scratch<T>(tokens * S), rows = scratch<T>(S * D);
      const Tensor slot_rows = matrix(rows.get(), S, D);
      for (int64_t g = begin; g < end; ++g) {
        const T* token_rows = read<T>(by_token) + g * tokens * D;
        T* out = write<T>(grad_logits) + g * tokens * S;
        cpu::soft_mix(read<T>(logits) + g * tokens * S, weights.get(), tokens, S, dim == 1, 0, 1);
        slots.take(read<T>(by_slot), g, rows.get());
        multiply(
            matrix(out, tokens, S), matrix(token_rows, tokens, D), transposed(rows.get(), S, D));
        cpu::soft_mix_backward(weights.get(), out, tokens, S, dim == 1, 0, 1);
        if (dim == 1) {
          T* grad_x = write<T>(grad_values) + g * tokens * D;
          multiply(matrix(grad_x, tokens, D), matrix(weights.get(), tokens, S), slot_rows);
        } else {
          multiply(slot_rows, transposed(weights.get(), tokens, S), matrix(token_rows, tokens, D));
          slots.put(rows.get(), g, write<T>(grad_values));
        }
      }
    });
  });
  return {grad_logits, grad_values};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_mix", TORCH_BOX(&soft_mix));
  m.impl("soft_mix_backward", TORCH_BOX(&soft_mix_backward));
}

}  // namespace vmoe
