// soft_logits -- the arguments of the op, which the code of both devices takes.
#pragma once

#include "../soft_logits.h"
#include "tensor.h"

namespace vmoe {

// The checked arguments. Tensors are contiguous.
struct SoftLogits {
  int64_t G, tokens, D, S;
  Tensor x;    // [G, T, D]
  Tensor phi;  // [D, S]
};

}  // namespace vmoe
