#include "soft_mix.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t G = in.integer(0, 3), tokens = in.integer(0, 40), S = in.integer(0, 70);
  const bool over_tokens = in.flag();
  Block<T> logits = in.values<T>(G * tokens * S), grad = in.values<T>(G * tokens * S);
  Block<T> weights(G * tokens * S);
  kernels::soft_mix<T>(logits, weights, tokens, S, over_tokens, 0, G);
  for (const T weight : weights) expect(!(weight < 0 || weight > T(1.001)));
  kernels::soft_mix_backward<T>(weights, grad, tokens, S, over_tokens, 0, G);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
