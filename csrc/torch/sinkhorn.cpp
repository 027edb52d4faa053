#include "../sinkhorn.h"

#include "tensor.h"

namespace vmoe {
namespace {

// Work per group, in elements, for parallel_groups. An entry takes one exp in each of the two
// updates of an iteration. The number of iterations is clamped, so that the product does not
// overflow.
[[maybe_unused]] int64_t work_of(int64_t tokens, int64_t E, int64_t iterations) {
  return 16 * tokens * E * std::min<int64_t>(iterations, 1 << 10);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& logits_, double epsilon, int64_t iterations, double tolerance, bool) {
  check_dim("sinkhorn", "logits", logits_, 3);
  STD_TORCH_CHECK(
      iterations >= 1 && iterations <= INT32_MAX, "sinkhorn: iterations = ", iterations,
      ", wanted 1 to 2**31 - 1");
  STD_TORCH_CHECK(epsilon > 0, "sinkhorn: epsilon = ", epsilon, ", wanted > 0");
  const int64_t G = logits_.size(0), tokens = logits_.size(1), E = logits_.size(2);
  STD_TORCH_CHECK(E > 0, "sinkhorn: logits has 0 experts, wanted at least 1");
  const Tensor logits = packed(logits_);
  Tensor plan = empty({G, tokens, E}, logits);
  Tensor history = empty({G, iterations, E}, logits, ScalarType::Double);
  Tensor error = empty({G}, logits, ScalarType::Double);
  Tensor steps = empty({G}, logits, ScalarType::Int);
  by_dtype("sinkhorn", logits, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("sinkhorn", logits, {}, [&](auto stream) {
      const Tensor scratch = workspace(logits, cuda::sinkhorn_workspace<T>(G, tokens, E));
      cuda::sinkhorn(
          read<T>(logits), write<T>(plan), write<double>(history), write<double>(error),
          write<int32_t>(steps), G, tokens, E, iterations, epsilon, tolerance, write<void>(scratch),
          stream);
    });
#else
    const int64_t work = work_of(tokens, E, iterations);
    parallel_groups(G, work, [&](int64_t begin, int64_t end, const Parallel& inside) {
      cpu::sinkhorn(
          read<T>(logits), write<T>(plan), write<double>(history), write<double>(error),
          write<int32_t>(steps), tokens, E, iterations, epsilon, tolerance, begin, end, inside);
    });
#endif
  });
  return {plan, history, error, steps};
}

Tensor sinkhorn_backward(
    const Tensor& grad_, const Tensor& logits_, const Tensor& history_, const Tensor& steps_,
    double epsilon) {
  check_dim("sinkhorn_backward", "logits", logits_, 3);
  check_dim("sinkhorn_backward", "history", history_, 3);
  const int64_t G = logits_.size(0), tokens = logits_.size(1), E = logits_.size(2);
  const int64_t iterations = history_.size(1);
  check_shape("sinkhorn_backward", "grad", grad_, {G, tokens, E});
  check_shape("sinkhorn_backward", "history", history_, {G, iterations, E});
  check_shape("sinkhorn_backward", "steps", steps_, {G});
  check_dtype("sinkhorn_backward", "grad", grad_, logits_.scalar_type());
  check_dtype("sinkhorn_backward", "history", history_, ScalarType::Double);
  check_dtype("sinkhorn_backward", "steps", steps_, ScalarType::Int);
  const Tensor grad = packed(grad_), logits = packed(logits_);
  const Tensor history = packed(history_), steps = packed(steps_);
  Tensor grad_logits = empty({G, tokens, E}, logits);
  by_dtype("sinkhorn_backward", logits, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("sinkhorn_backward", logits, {grad, history, steps}, [&](auto stream) {
      const Tensor scratch = workspace(logits, cuda::sinkhorn_backward_workspace<T>(G, tokens, E));
      cuda::sinkhorn_backward(
          read<T>(grad), read<T>(logits), read<double>(history), read<int32_t>(steps),
          write<T>(grad_logits), G, tokens, E, iterations, epsilon, write<void>(scratch), stream);
    });
#else
    const int64_t work = work_of(tokens, E, iterations);
    parallel_groups(G, work, [&](int64_t begin, int64_t end, const Parallel& inside) {
      cpu::sinkhorn_backward(
          read<T>(grad), read<T>(logits), read<double>(history), read<int32_t>(steps),
          write<T>(grad_logits), tokens, E, iterations, epsilon, begin, end, inside);
    });
#endif
  });
  return grad_logits;
}

Tensor sinkhorn_implicit_backward(const Tensor& grad_, const Tensor& plan_, double epsilon) {
  check_dim("sinkhorn_implicit_backward", "plan", plan_, 3);
  const int64_t G = plan_.size(0), tokens = plan_.size(1), E = plan_.size(2);
  check_shape("sinkhorn_implicit_backward", "grad", grad_, {G, tokens, E});
  check_dtype("sinkhorn_implicit_backward", "grad", grad_, plan_.scalar_type());
  const Tensor grad = packed(grad_), plan = packed(plan_);
  Tensor grad_logits = empty({G, tokens, E}, plan);
  by_dtype("sinkhorn_implicit_backward", plan, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("sinkhorn_implicit_backward", plan, {grad}, [&](auto stream) {
      const Tensor scratch =
          workspace(plan, cuda::sinkhorn_implicit_backward_workspace<T>(G, tokens, E));
      cuda::sinkhorn_implicit_backward(
          read<T>(grad), read<T>(plan), write<T>(grad_logits), G, tokens, E, epsilon,
          write<void>(scratch), stream);
    });
#else
    const int64_t work = (tokens + E) * E * E;
    parallel_groups(G, work, [&](int64_t begin, int64_t end, const Parallel& inside) {
      cpu::sinkhorn_implicit_backward(
          read<T>(grad), read<T>(plan), write<T>(grad_logits), tokens, E, epsilon, begin, end,
          inside);
    });
#endif
  });
  return grad_logits;
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward));
  m.impl("sinkhorn_implicit_backward", TORCH_BOX(&sinkhorn_implicit_backward));
}

}  // namespace vmoe
