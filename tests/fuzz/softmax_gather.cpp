#include "softmax_gather.h"

#include "input.h"

namespace vmoe {

// The indices are untrusted: any int32 values.
template <typename T>
void fuzz(Input& in, T) {
  const int64_t G = in.integer(0, 3), tokens = in.integer(0, 40), E = in.integer(1, 70);
  const int64_t K = in.integer(0, 9);
  const bool by_expert = in.flag();
  const int64_t rows = by_expert ? E : tokens;
  Block<T> logits = in.values<T>(G * tokens * E), grad = in.values<T>(G * rows * K);
  Block<int32_t> indices = in.values<int32_t>(G * rows * K);
  Block<T> high(G * tokens), scale(G * tokens), values(G * rows * K), dots(G * tokens);
  Block<T> grad_logits(G * tokens * E);
  kernels::softmax_norms<T>(logits, high, scale, E, 0, G * tokens);
  kernels::softmax_gather<T>(
      logits, indices, high, scale, values, tokens, E, K, by_expert, 0, G * rows);
  kernels::softmax_dots<T>(grad, values, indices, dots, tokens, E, K, by_expert, 0, G * rows);
  kernels::softmax_gather_backward<T>(logits, high, scale, dots, grad_logits, E, 0, G * tokens);
  kernels::softmax_scatter<T>(
      grad, values, indices, grad_logits, tokens, E, K, by_expert, 0, G * rows);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
