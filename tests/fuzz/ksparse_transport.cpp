#include "ksparse_transport.h"

#include <cmath>

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t G = in.integer(0, 2), tokens = in.integer(0, 40), E = in.integer(1, 20);
  const int64_t size = G * tokens * E;
  const TransportOptions options{
      in.integer(tokens ? 1 : 0, tokens),
      in.integer(0, 5),
      in.flag() ? Solver::kAdam : Solver::kLbfgs,
      std::ldexp(1.0, 4 * in.integer(-30, 30)),
      in.flag() ? 1e-3 : 0,
      std::ldexp(1.0, 4 * in.integer(-30, 30))};
  Block<T> similarity = in.values<T>(size), plan(size);
  kernels::ksparse_transport<T>(similarity, plan, tokens, E, options, 0, G, Parallel{});
  for (const T entry : plan) expect(!(entry < 0));
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
