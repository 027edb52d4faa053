#include "../softmax_topk.h"

#include "tensor.h"

namespace vmoe {
namespace {

std::tuple<Tensor, Tensor, Tensor> softmax_topk(const Tensor& logits_, int64_t k, int64_t dim) {
  check_dim("softmax_topk", "logits", logits_, 3);
  STD_TORCH_CHECK(dim == 1 || dim == 2, "softmax_topk: dim = ", dim, ", wanted 1 or 2");
  const int64_t n = logits_.size(dim), rows = logits_.size(3 - dim);
  STD_TORCH_CHECK(
      k >= 0 && k <= n, "softmax_topk: k = ", k, ", wanted 0 to the length of the axis, ", n);
  STD_TORCH_CHECK(
      n <= INT32_MAX, "softmax_topk: an axis of ", n, " entries does not fit int32 indices");
  const int64_t G = logits_.size(0), tokens = logits_.size(1), E = logits_.size(2);
  const Tensor logits = packed(logits_);
  Tensor values = empty({G, rows, k}, logits);
  Tensor indices = empty({G, rows, k}, logits, ScalarType::Int);
  Tensor norms = empty({2, G, tokens}, logits);
  by_dtype("softmax_topk", logits, [&](auto zero) {
    using T = decltype(zero);
    T *high = write<T>(norms), *scale = high + G * tokens;
#ifdef VMOE_DEVICE_CUDA
    on_device("softmax_topk", logits, {}, [&](auto stream) {
      const bool of_tokens = dim == 1;
      const Tensor scratch =
          workspace(logits, cuda::softmax_topk_workspace<T>(G, tokens, E, k, of_tokens));
      cuda::softmax_topk(
          read<T>(logits), write<T>(values), write<int32_t>(indices), high, scale, G, tokens, E, k,
          of_tokens, write<void>(scratch), stream);
    });
#else
    if (dim == 2) {
      parallel(G * tokens, E, [&](int64_t begin, int64_t end) {
        cpu::softmax_topk(
            read<T>(logits), write<T>(values), write<int32_t>(indices), high, scale, E, k, begin,
            end);
      });
      return;
    }
    // Long columns of gates are read faster if each column is contiguous. Several short columns are
    // read at the same time, one column per lane of a vector.
    const bool by_expert = tokens > 1024;
    Tensor gates = empty({G, tokens, E}, logits);
    parallel(G * tokens, E, [&](int64_t begin, int64_t end) {
      cpu::softmax_gates(
          read<T>(logits), write<T>(gates), high, scale, tokens, E, by_expert, begin, end);
    });
    parallel(G * E, tokens, [&](int64_t begin, int64_t end) {
      cpu::softmax_choose(
          read<T>(gates), write<T>(values), write<int32_t>(indices), tokens, E, k, by_expert, begin,
          end);
    });
#endif
  });
  return {values, indices, norms};
}

}  // namespace

VMOE_REGISTER(m) { m.impl("softmax_topk", TORCH_BOX(&softmax_topk)); }

}  // namespace vmoe
