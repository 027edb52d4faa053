#include "../soft_mix.h"

#include <cmath>
#include <limits>
#include <vector>

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Both softmaxes walk the matrix row by row, as it lies in memory. `line` picks the
// accumulator: a row's (over slots) or a column's (over tokens).
struct Walk {
  int64_t tokens, S;
  bool over_tokens;

  int64_t lines() const { return over_tokens ? S : tokens; }

  template <typename Body>
  void operator()(Body&& body) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t s = 0; s < S; ++s) body(t * S + s, over_tokens ? s : t);
    }
  }
};

}  // namespace

template <typename T>
void soft_mix(
    const T* logits, T* weights, int64_t tokens, int64_t S, bool over_tokens, int64_t group_begin,
    int64_t group_end) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const Walk walk{tokens, S, over_tokens};
  std::vector<T> high(walk.lines()), total(walk.lines());
  for (int64_t g = group_begin; g < group_end; ++g) {
    const T* in = logits + g * tokens * S;
    T* out = weights + g * tokens * S;
    high.assign(high.size(), -kInf);
    total.assign(total.size(), 0);
    walk([&](int64_t i, int64_t line) {
      // Written so that NaN replaces the maximum, stays, and makes the line NaN.
      if (!(in[i] <= high[line]) && high[line] == high[line]) high[line] = in[i];
    });
    walk([&](int64_t i, int64_t line) {
      out[i] = high[line] == -kInf ? T{0} : std::exp(in[i] - high[line]);
      total[line] += out[i];
    });
    walk([&](int64_t i, int64_t line) {
      if (high[line] != -kInf) out[i] /= total[line];
    });
  }
}

template <typename T>
void soft_mix_backward(
    const T* weights, T* grad, int64_t tokens, int64_t S, bool over_tokens, int64_t group_begin,
    int64_t group_end) {
  const Walk walk{tokens, S, over_tokens};
  std::vector<T> mean(walk.lines());
  for (int64_t g = group_begin; g < group_end; ++g) {
    const T* w = weights + g * tokens * S;
    T* d = grad + g * tokens * S;
    mean.assign(mean.size(), 0);
    walk([&](int64_t i, int64_t line) { mean[line] += w[i] * d[i]; });
    walk([&](int64_t i, int64_t line) { d[i] = w[i] * (d[i] - mean[line]); });
  }
}

template void soft_mix(const float*, float*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix(const double*, double*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix_backward(const float*, float*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix_backward(const double*, double*, int64_t, int64_t, bool, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
