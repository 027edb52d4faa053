// soft_mix on a CPU -- groups in parallel. The softmax and the product of a group run on the same
// thread.
#pragma once

#include <cstring>

#include "../../cpu/buffer.h"
#include "../soft_mix.h"
#include "product.h"

namespace vmoe {
namespace {

// Copies slots to rows and back. Slots [E, G, C, D] are in the order in which experts read them.
// Rows [S, D] of one group are in the order in which products read them. The thread that multiplies
// rows also copies them, so no tensor for the rows of all groups is needed.
template <typename T>
struct SlotRows {
  int64_t E, G, C, D;

  // Copies the slots of the groups [first, first + count) to rows [count, S, D].
  void take(const T* slots, int64_t first, int64_t count, T* rows) const {
    each(first, count, [&](int64_t slot, int64_t row) {
      memcpy(rows + row, slots + slot, C * D * sizeof(T));
    });
  }
  // The inverse of take.
  void put(const T* rows, int64_t first, int64_t count, T* slots) const {
    each(first, count, [&](int64_t slot, int64_t row) {
      memcpy(slots + slot, rows + row, C * D * sizeof(T));
    });
  }

 private:
  // Calls body(offset in slots, offset in rows) for the C slots of every expert in every group.
  template <typename Body>
  void each(int64_t first, int64_t count, Body&& body) const {
    if (C * D == 0) return;
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t e = 0; e < E; ++e) body((e * G + first + g) * C * D, (g * E + e) * C * D);
    }
  }
};

void run_forward(const SoftMix& mix, const Tensor& out) {
  const int64_t tokens = mix.tokens, S = mix.S(), D = mix.D;
  by_dtype("soft_mix", mix.values, [&](auto zero) {
    using T = decltype(zero);
    const SlotRows<T> slots{mix.E, mix.G, mix.C, D};
    const T* values = read<T>(mix.values);
    parallel_runs(mix.G, 2 * tokens * S + (tokens + S) * D, [&](int64_t first, int64_t count) {
      const cpu::Buffer<T> weights(count * tokens * S), rows(count * S * D);
      const T* logits = read<T>(mix.logits) + first * tokens * S;
      cpu::soft_mix(logits, weights.get(), tokens, S, mix.over_tokens, 0, count);
      if (!mix.over_tokens) slots.take(values, first, count, rows.get());
      for (int64_t i = 0; i < count; ++i) {
        const Matrix<T> slot_rows = matrix(rows.get() + i * S * D, S, D);
        const T* weights_of = weights.get() + i * tokens * S;
        const int64_t token_rows = (first + i) * tokens * D;
        if (mix.over_tokens) {
          multiply<T>(
              slot_rows, transposed(weights_of, tokens, S), matrix(values + token_rows, tokens, D));
        } else {
          multiply<T>(
              matrix(write<T>(out) + token_rows, tokens, D), matrix(weights_of, tokens, S),
              slot_rows);
        }
      }
      if (mix.over_tokens) slots.put(rows.get(), first, count, write<T>(out));
    });
  });
}

void run_backward(
    const SoftMix& mix, const Tensor& grad, const Tensor& grad_logits, const Tensor& grad_values) {
  const int64_t tokens = mix.tokens, S = mix.S(), D = mix.D;
  const Tensor& by_token = mix.over_tokens ? mix.values : grad;
  const Tensor& by_slot = mix.over_tokens ? grad : mix.values;
  by_dtype("soft_mix_backward", mix.values, [&](auto zero) {
    using T = decltype(zero);
    const SlotRows<T> slots{mix.E, mix.G, mix.C, D};
    parallel_runs(mix.G, 3 * tokens * S + (2 * tokens + S) * D, [&](int64_t first, int64_t count) {
      const cpu::Buffer<T> weights(count * tokens * S), rows(count * S * D);
      const T* logits = read<T>(mix.logits) + first * tokens * S;
      T* out = write<T>(grad_logits) + first * tokens * S;
      cpu::soft_mix(logits, weights.get(), tokens, S, mix.over_tokens, 0, count);
      slots.take(read<T>(by_slot), first, count, rows.get());
      for (int64_t i = 0; i < count; ++i) {
        const T* weights_of = weights.get() + i * tokens * S;
        const int64_t of_tokens = (first + i) * tokens * D;
        const Matrix<const T> token_rows = matrix(read<T>(by_token) + of_tokens, tokens, D);
        T* slot_rows = rows.get() + i * S * D;
        const Matrix<T> grad_of = matrix(out + i * tokens * S, tokens, S);
        multiply<T>(grad_of, token_rows, transposed(slot_rows, S, D));
        cpu::soft_mix_backward(weights_of, grad_of.data, tokens, S, mix.over_tokens, 0, int64_t{1});
        if (mix.over_tokens) {
          multiply<T>(
              matrix(write<T>(grad_values) + of_tokens, tokens, D), matrix(weights_of, tokens, S),
              matrix(slot_rows, S, D));
        } else {
          multiply<T>(matrix(slot_rows, S, D), transposed(weights_of, tokens, S), token_rows);
        }
      }
      if (!mix.over_tokens) slots.put(rows.get(), first, count, write<T>(grad_values));
    });
  });
}

}  // namespace
}  // namespace vmoe
