#include "../ksparse_transport.h"

#include "tensor.h"

namespace vmoe {
namespace {

Tensor ksparse_transport(
    const Tensor& similarity_, int64_t k, int64_t iterations, std::string solver,
    double learning_rate, double tolerance, double gamma) {
  check_dim("ksparse_transport", "similarity", similarity_, 3);
  const int64_t G = similarity_.size(0), tokens = similarity_.size(1), E = similarity_.size(2);
  STD_TORCH_CHECK(
      k >= std::min<int64_t>(1, tokens) && k <= tokens, "ksparse_transport: k = ", k,
      ", wanted 1 to the number of tokens, ", tokens);
  STD_TORCH_CHECK(
      solver == "adam" || solver == "lbfgs", "ksparse_transport: solver = '", solver,
      "', wanted 'adam' or 'lbfgs'");
  STD_TORCH_CHECK(
      iterations >= 0 && iterations <= INT32_MAX, "ksparse_transport: iterations = ", iterations,
      ", wanted 0 to 2**31 - 1");
  STD_TORCH_CHECK(gamma > 0, "ksparse_transport: gamma = ", gamma, ", wanted > 0");
  const TransportOptions options{
      k,         iterations, solver == "adam" ? Solver::kAdam : Solver::kLbfgs, learning_rate,
      tolerance, gamma};
  const Tensor similarity = packed(similarity_);
  Tensor plan = empty({G, tokens, E}, similarity);
  if (plan.numel() == 0) return plan;
  by_dtype("ksparse_transport", similarity, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("ksparse_transport", similarity, {}, [&](auto stream) {
      const Tensor scratch =
          workspace(similarity, cuda::ksparse_transport_workspace<T>(G, tokens, E, options));
      cuda::ksparse_transport(
          read<T>(similarity), write<T>(plan), G, tokens, E, options, write<void>(scratch), stream);
    });
#else
    const int64_t work = tokens * E * std::min<int64_t>(iterations + 1, 1 << 10);
    parallel_groups(G, work, [&](int64_t begin, int64_t end, const Parallel& inside) {
      cpu::ksparse_transport(
          read<T>(similarity), write<T>(plan), tokens, E, options, begin, end, inside);
    });
#endif
  });
  return plan;
}

}  // namespace

VMOE_REGISTER(m) { m.impl("ksparse_transport", TORCH_BOX(&ksparse_transport)); }

}  // namespace vmoe
