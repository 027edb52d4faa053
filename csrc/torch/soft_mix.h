// soft_mix -- the arguments of the op, which the code of both devices takes.
#pragma once

#include "../soft_mix.h"
#include "tensor.h"

namespace vmoe {

// The checked arguments. Tensors are contiguous.
struct SoftMix {
  int64_t G, tokens, E, C, D;
  bool over_tokens;  // true: values are tokens, means are slots (dispatch); false: the reverse
  Tensor logits;     // [G, T, S]
  Tensor values;     // [G, T, D] or [E, G, C, D]

  int64_t S() const { return E * C; }
};

}  // namespace vmoe
