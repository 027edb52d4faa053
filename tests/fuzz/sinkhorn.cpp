#include "sinkhorn.h"

#include <cmath>

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t G = in.integer(0, 2), tokens = in.integer(0, 40), E = in.integer(1, 40);
  const int64_t iterations = in.integer(1, 4), size = G * tokens * E;
  const double epsilon = std::ldexp(1.0, 4 * in.integer(-30, 30)), tolerance = in.flag() ? 1e-3 : 0;
  Block<T> logits = in.values<T>(size), grad = in.values<T>(size), plan(size), grad_logits(size);
  Block<double> history(G * iterations * E), error(G);
  Block<int32_t> steps(G), hostile_steps = in.values<int32_t>(G);
  const Parallel alone{};
  kernels::sinkhorn<T>(
      logits, plan, history, error, steps, tokens, E, iterations, epsilon, tolerance, 0, G, alone);
  for (const int32_t count : steps) expect(count >= 0 && count <= iterations);
  for (const T entry : plan) expect(!(entry < 0 || entry > T(1.001)));
  int32_t* given = in.flag() ? hostile_steps : steps;
  kernels::sinkhorn_backward<T>(
      grad, logits, history, given, grad_logits, tokens, E, iterations, epsilon, 0, G, alone);
  kernels::sinkhorn_implicit_backward<T>(grad, plan, grad_logits, tokens, E, epsilon, 0, G, alone);
  kernels::sinkhorn_implicit_backward<T>(
      grad, logits, grad_logits, tokens, E, epsilon, 0, G, alone);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
