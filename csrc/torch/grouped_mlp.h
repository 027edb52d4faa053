// grouped_mlp -- what its bindings for both devices take.
#pragma once

#include "../grouped_mlp.h"
#include "tensor.h"

namespace vmoe {

// Checked and packed.
struct ExpertMlps {
  int64_t E, N, D, F, out, G;
  Tensor x, w1, w2;
  std::optional<Tensor> b1, filled;
  bool tanh;
};

// Those of x, and those of the weights, have no entries where they are not asked for.
struct ExpertMlpGradients {
  Tensor x, w1, b1, w2, b2;
  bool of_x, of_weights;
};

template <typename T>
const T* read_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

}  // namespace vmoe
