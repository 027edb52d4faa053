// soft_logits -- what its bindings for both devices take.
#pragma once

#include "../soft_logits.h"
#include "tensor.h"

namespace vmoe {

// Checked and packed.
struct SoftLogits {
  int64_t G, tokens, D, S;
  Tensor x;    // [G, T, D]
  Tensor phi;  // [D, S]
};

}  // namespace vmoe
