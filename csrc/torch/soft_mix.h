// soft_mix -- what its bindings for both devices take.
#pragma once

#include "../soft_mix.h"
#include "tensor.h"

namespace vmoe {

// Checked and packed.
struct SoftMix {
  int64_t G, tokens, E, C, D;
  bool over_tokens;  // dispatch: the values are tokens and the means slots; else the reverse
  Tensor logits;     // [G, T, S]
  Tensor values;     // [G, T, D] or [E, G, C, D]

  int64_t S() const { return E * C; }
};

}  // namespace vmoe
