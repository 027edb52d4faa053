#include "../soft_mix.h"

#include <cstring>

#include "../common/row_stride.h"
#include "product.h"

namespace vmoe {
namespace {

#ifdef VMOE_DEVICE_CUDA
using torch::stable::narrow;
using torch::stable::transpose;

// The slots lie as the experts take them, [E, G, C, D]; a product takes a group's in one piece,
// [G, S, D]: as they lie where one stride leads from slot to slot, else copied.
template <typename Row>
struct Slots {
  int64_t E, G, C, D;
  cudaStream_t stream;

  bool in_place() const { return E == 1 || G == 1 || C == 1; }

  Tensor take(const Tensor& slots) const {
    if (in_place()) return view(slots);
    const Tensor rows = empty({G, E * C, D}, slots);
    cuda::soft_mix_rows(read<Row>(slots), write<Row>(rows), G, E, C, D, stream);
    return rows;
  }
  // Where the rows go that become these slots.
  Tensor room(const Tensor& slots) const {
    return in_place() ? view(slots) : empty({G, E * C, D}, slots);
  }
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
#else
// The slots lie as the experts take them, [E, G, C, D]; a group's products take them in one
// piece, [S, D]. Copied by the thread that multiplies them they need no tensor between.
template <typename T>
struct Slots {
  int64_t E, G, C, D;

  // Groups [first, first + count) to rows [count, S, D].
  void take(const T* slots, int64_t first, int64_t count, T* rows) const {
    each(first, count, [&](int64_t slot, int64_t row) {
      memcpy(rows + row, slots + slot, C * D * sizeof(T));
    });
  }
  void put(const T* rows, int64_t first, int64_t count, T* slots) const {
    each(first, count, [&](int64_t slot, int64_t row) {
      memcpy(slots + slot, rows + row, C * D * sizeof(T));
    });
  }

 private:
  // body(offset in slots, offset in rows) of every expert's C slots of a group.
  template <typename Body>
  void each(int64_t first, int64_t count, Body&& body) const {
    if (C * D == 0) return;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t e = 0; e < E; ++e) body((e * G + first + g) * C * D, (g * E + e) * C * D);
    }
  }
};
#endif

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
  check_dtype(op, "logits", logits, compute_dtype(values));
}

Tensor soft_mix(
    const Tensor& logits_in, const Tensor& values_in, int64_t dim, int64_t num_experts) {
  check("soft_mix", logits_in, values_in, dim, num_experts);
  const Tensor logits = packed(logits_in), values = packed(values_in);
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2);
  const int64_t D = values.size(values.dim() - 1), C = S / num_experts;
  Tensor out = dim == 1 ? empty({num_experts, G, C, D}, values) : empty({G, tokens, D}, values);
#ifdef VMOE_DEVICE_CUDA
  by_row_dtype("soft_mix", values, [&](auto zero) {
    using Row = decltype(zero);
    on_device("soft_mix", logits, {values}, [&](auto stream) {
      if constexpr (kHalf<Row>) {
        if (cuda::soft_mix_product(
                read<float>(logits), read<Row>(values), write<Row>(out), G, tokens, num_experts, C,
                D, dim == 1, stream)) {
          return;
        }
      }
      const Slots<Row> slots{num_experts, G, C, D, stream};
      Tensor weights = empty({G, tokens, row_stride<Row>(S)}, values);
      weights = narrow(weights, 2, 0, S);
      cuda::soft_mix(
          read<Compute<Row>>(logits), write<Row>(weights), G, tokens, S, dim == 1, stream);
      if (dim == 1) {
        const Tensor rows = slots.room(out);
        multiply(rows, transpose(weights, 1, 2), values);
        slots.put(rows, out);
      } else {
        multiply(out, weights, slots.take(values));
      }
    });
  });
#else
  by_dtype("soft_mix", values, [&](auto zero) {
    using T = decltype(zero);
    const Slots<T> slots{num_experts, G, C, D};
    parallel_runs(G, 2 * tokens * S + (tokens + S) * D, [&](int64_t first, int64_t count) {
      const auto weights = scratch<T>(count * tokens * S), rows = scratch<T>(count * S * D);
      const T* in = read<T>(logits) + first * tokens * S;
      cpu::soft_mix(in, weights.get(), tokens, S, dim == 1, 0, count);
      if (dim == 2) slots.take(read<T>(values), first, count, rows.get());
      for (int64_t i = 0; i < count; ++i) {
        const Matrix<T> slot_rows = matrix(rows.get() + i * S * D, S, D);
        const T* weights_of = weights.get() + i * tokens * S;
        const int64_t token_rows = (first + i) * tokens * D;
        if (dim == 1) {
          multiply<T>(
              slot_rows, transposed(weights_of, tokens, S),
              matrix(read<T>(values) + token_rows, tokens, D));
        } else {
          multiply<T>(
              matrix(write<T>(out) + token_rows, tokens, D), matrix(weights_of, tokens, S),
              slot_rows);
        }
      }
      if (dim == 1) slots.put(rows.get(), first, count, write<T>(out));
    });
  });
#endif
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
  check_dtype("soft_mix_backward", "grad", grad, values.scalar_type());
  Tensor grad_logits = empty({G, tokens, S}, logits);
  Tensor grad_values =
      dim == 1 ? empty({G, tokens, D}, values) : empty({num_experts, G, C, D}, values);
  const Tensor& by_token = dim == 1 ? values : grad;
  const Tensor& by_slot = dim == 1 ? grad : values;
#ifdef VMOE_DEVICE_CUDA
  by_row_dtype("soft_mix_backward", values, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_mix_backward", logits, {grad, values}, [&](auto stream) {
      const Slots<Row> slots{num_experts, G, C, D, stream};
      const Tensor rows = slots.take(by_slot);
      multiply(grad_logits, by_token, transpose(rows, 1, 2));
      Tensor weights = empty({G, tokens, row_stride<Row>(S)}, values);
      weights = narrow(weights, 2, 0, S);
      cuda::soft_mix_backward(
          read<T>(logits), write<Row>(weights), write<T>(grad_logits), G, tokens, S, dim == 1,
          stream);
      if (dim == 1) {
        multiply(grad_values, weights, rows);
      } else {
        const Tensor grads = slots.room(grad_values);
        multiply(grads, transpose(weights, 1, 2), by_token);
        slots.put(grads, grad_values);
      }
    });
  });
#else
  by_dtype("soft_mix_backward", values, [&](auto zero) {
    using T = decltype(zero);
    const Slots<T> slots{num_experts, G, C, D};
    parallel_runs(G, 3 * tokens * S + (2 * tokens + S) * D, [&](int64_t first, int64_t count) {
      const auto weights = scratch<T>(count * tokens * S), rows = scratch<T>(count * S * D);
      const T* in = read<T>(logits) + first * tokens * S;
      T* out = write<T>(grad_logits) + first * tokens * S;
      cpu::soft_mix(in, weights.get(), tokens, S, dim == 1, 0, count);
      slots.take(read<T>(by_slot), first, count, rows.get());
      for (int64_t i = 0; i < count; ++i) {
        const T* weights_of = weights.get() + i * tokens * S;
        const int64_t of_tokens = (first + i) * tokens * D;
        const Matrix<const T> token_rows = matrix(read<T>(by_token) + of_tokens, tokens, D);
        T* slot_rows = rows.get() + i * S * D;
        const Matrix<T> grad_of = matrix(out + i * tokens * S, tokens, S);
        multiply<T>(grad_of, token_rows, transposed(slot_rows, S, D));
        cpu::soft_mix_backward(weights_of, grad_of.data, tokens, S, dim == 1, 0, int64_t{1});
        if (dim == 1) {
          multiply<T>(
              matrix(write<T>(grad_values) + of_tokens, tokens, D), matrix(weights_of, tokens, S),
              matrix(slot_rows, S, D));
        } else {
          multiply<T>(matrix(slot_rows, S, D), transposed(weights_of, tokens, S), token_rows);
        }
      }
      if (dim == 2) slots.put(rows.get(), first, count, write<T>(grad_values));
    });
  });
#endif
  return {grad_logits, grad_values};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_mix", TORCH_BOX(&soft_mix));
  m.impl("soft_mix_backward", TORCH_BOX(&soft_mix_backward));
}

}  // namespace vmoe
