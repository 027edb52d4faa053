#include "../softmax_gather.h"

#include "tensor.h"

namespace vmoe {
namespace {

struct Shape {
  int64_t G, tokens, E, K;
  bool by_expert;

  int64_t rows() const { return G * (by_expert ? E : tokens); }
};

Shape check(const char* op, const Tensor& logits, const Tensor& indices, int64_t dim) {
  check_dim(op, "logits", logits, 3);
  check_dim(op, "indices", indices, 3);
  check_dtype(op, "indices", indices, ScalarType::Int);
  STD_TORCH_CHECK(dim == 1 || dim == 2, op, ": dim = ", dim, ", wanted 1 or 2");
  const Shape shape{logits.size(0), logits.size(1), logits.size(2), indices.size(2), dim == 1};
  check_shape(op, "indices", indices, {shape.G, logits.size(3 - dim), shape.K});
  return shape;
}

std::tuple<Tensor, Tensor> softmax_gather(
    const Tensor& logits_, const Tensor& indices_, int64_t dim) {
  const Shape shape = check("softmax_gather", logits_, indices_, dim);
  const auto [G, tokens, E, K, by_expert] = shape;
  const Tensor logits = packed(logits_), indices = packed(indices_);
  Tensor values = empty({G, by_expert ? E : tokens, K}, logits);
  Tensor norms = empty({2, G, tokens}, logits);
  by_dtype("softmax_gather", logits, [&](auto zero) {
    using T = decltype(zero);
    T *high = write<T>(norms), *scale = high + shape.G * shape.tokens;
#ifdef VMOE_DEVICE_CUDA
    on_device("softmax_gather", logits, {indices}, [&](auto stream) {
      cuda::softmax_gather(
          read<T>(logits), read<int32_t>(indices), write<T>(values), high, scale, shape.G,
          shape.tokens, shape.E, shape.K, shape.by_expert, stream);
    });
#else
    parallel(shape.G * shape.tokens, shape.E, [&](int64_t begin, int64_t end) {
      cpu::softmax_norms(read<T>(logits), high, scale, shape.E, begin, end);
    });
    parallel(shape.rows(), shape.K, [&](int64_t begin, int64_t end) {
      cpu::softmax_gather(
          read<T>(logits), read<int32_t>(indices), static_cast<const T*>(high),
          static_cast<const T*>(scale), write<T>(values), shape.tokens, shape.E, shape.K,
          shape.by_expert, begin, end);
    });
#endif
  });
  return {values, norms};
}

Tensor softmax_gather_backward(
    const Tensor& grad_, const Tensor& values_, const Tensor& logits_, const Tensor& indices_,
    const Tensor& norms_, int64_t dim) {
  constexpr const char* op = "softmax_gather_backward";
  const Shape shape = check(op, logits_, indices_, dim);
  const auto [G, tokens, E, K, by_expert] = shape;
  check_shape(op, "grad", grad_, {G, by_expert ? E : tokens, K});
  check_shape(op, "values", values_, {G, by_expert ? E : tokens, K});
  check_shape(op, "norms", norms_, {2, G, tokens});
  check_dtype(op, "grad", grad_, logits_.scalar_type());
  check_dtype(op, "values", values_, logits_.scalar_type());
  check_dtype(op, "norms", norms_, logits_.scalar_type());
  const Tensor grad = packed(grad_), values = packed(values_), logits = packed(logits_);
  const Tensor indices = packed(indices_), norms = packed(norms_);
  Tensor grad_logits = empty({G, tokens, E}, logits);
  by_dtype(op, logits, [&](auto zero) {
    using T = decltype(zero);
    const T *high = read<T>(norms), *scale = high + shape.G * shape.tokens;
#ifdef VMOE_DEVICE_CUDA
    // With by_expert the kernel calls invert_slots, which numbers the picks of a group in int32.
    const int64_t picks = shape.by_expert ? shape.E * shape.K : 0;
    STD_TORCH_CHECK(picks <= INT32_MAX, op, ": ", picks, " indices per group do not fit int32");
    on_device(op, logits, {grad, values, indices, norms}, [&](auto stream) {
      const Tensor scratch = workspace(
          logits, cuda::softmax_gather_backward_workspace(
                      shape.G, shape.tokens, shape.E, shape.K, shape.by_expert));
      cuda::softmax_gather_backward(
          read<T>(grad), read<T>(values), read<T>(logits), read<int32_t>(indices), high, scale,
          write<T>(grad_logits), shape.G, shape.tokens, shape.E, shape.K, shape.by_expert,
          write<void>(scratch), stream);
    });
#else
    const Tensor dots = torch::stable::new_zeros(logits, {shape.G, shape.tokens});
    const auto dot = [&](int64_t begin, int64_t end) {
      cpu::softmax_dots(
          read<T>(grad), read<T>(values), read<int32_t>(indices), write<T>(dots), shape.tokens,
          shape.E, shape.K, shape.by_expert, begin, end);
    };
    const auto backward = [&](int64_t begin, int64_t end) {
      cpu::softmax_gather_backward(
          read<T>(logits), high, scale, read<T>(dots), write<T>(grad_logits), shape.E, begin, end);
    };
    const auto scatter = [&](int64_t begin, int64_t end) {
      cpu::softmax_scatter(
          read<T>(grad), read<T>(values), read<int32_t>(indices), write<T>(grad_logits),
          shape.tokens, shape.E, shape.K, shape.by_expert, begin, end);
    };
    if (shape.by_expert) {
      // The picks of an expert may be any tokens, so each step waits for the end of the previous
      // step.
      parallel(shape.G, shape.E * shape.K, [&](int64_t begin, int64_t end) {
        dot(begin * shape.E, end * shape.E);
      });
      parallel(shape.G * shape.tokens, shape.E, backward);
      parallel(shape.rows(), shape.K, scatter);
      return;
    }
    // Each row has the picks of one token. So a few rows at a time go through all three steps while
    // these rows are in the first-level cache.
    constexpr int64_t kTogether = 64;
    parallel(shape.rows(), shape.E, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kTogether) {
        const int64_t last = std::min(first + kTogether, end);
        dot(first, last);
        backward(first, last);
        scatter(first, last);
      }
    });
#endif
  });
  return grad_logits;
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("softmax_gather", TORCH_BOX(&softmax_gather));
  m.impl("softmax_gather_backward", TORCH_BOX(&softmax_gather_backward));
}

}  // namespace vmoe
