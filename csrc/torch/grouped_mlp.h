// grouped_mlp -- the arguments of the op, which the code of both devices takes.
#pragma once

#include "../grouped_mlp.h"
#include "tensor.h"

namespace vmoe {

// The checked arguments. Tensors are contiguous.
struct ExpertMlps {
  int64_t E, N, D, F, out, G;
  Tensor x, w1, w2;
  std::optional<Tensor> b1, filled;
  bool tanh;
};

// The gradients to compute. Tensors that are not asked for (of_x, of_weights) are empty.
struct ExpertMlpGradients {
  Tensor x, w1, b1, w2, b2;
  bool of_x, of_weights;
};

template <typename T>
const T* read_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

}  // namespace vmoe
