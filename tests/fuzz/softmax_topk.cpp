#include "softmax_topk.h"

#include "input.h"
#include "softmax_gather.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t G = in.integer(0, 3), tokens = in.integer(0, 40), E = in.integer(1, 70);
  Block<T> logits = in.values<T>(G * tokens * E);
  Block<T> high(G * tokens), scale(G * tokens);
  const bool of_tokens = in.flag(), by_expert = in.flag();
  const int64_t rows = of_tokens ? E : tokens, places = of_tokens ? tokens : E,
                k = in.integer(0, places);
  Block<T> values(G * rows * k);
  Block<int32_t> indices(G * rows * k);
  if (of_tokens) {
    Block<T> gates(G * tokens * E);
    kernels::softmax_gates<T>(logits, gates, high, scale, tokens, E, by_expert, 0, G * tokens);
    kernels::softmax_choose<T>(gates, values, indices, tokens, E, k, by_expert, 0, G * E);
  } else {
    kernels::softmax_topk<T>(logits, values, indices, high, scale, E, k, 0, G * tokens);
  }
  for (const int32_t index : indices) expect(index >= -1 && index < places);

  Block<T> again(G * rows * k), dots(G * tokens), grad_logits(G * tokens * E);
  kernels::softmax_gather<T>(
      logits, indices, high, scale, again, tokens, E, k, of_tokens, 0, G * rows);
  for (int64_t i = 0; i < values.size(); ++i) {
    expect(values[i] == again[i] || (values[i] != values[i] && again[i] != again[i]));
  }
  kernels::softmax_dots<T>(again, values, indices, dots, tokens, E, k, of_tokens, 0, G * rows);
  kernels::softmax_gather_backward<T>(logits, high, scale, dots, grad_logits, E, 0, G * tokens);
  kernels::softmax_scatter<T>(
      again, values, indices, grad_logits, tokens, E, k, of_tokens, 0, G * rows);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
