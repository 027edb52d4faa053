#include "../soft_mix.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "softmax.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// A matrix [tokens, S], which both softmaxes read row by row, in vectors along the slots. The
// remainder of a row is padded to a whole vector, so that every entry gets the same arithmetic.
template <typename T>
struct Rows {
  static constexpr int64_t W = kWidth<T>;
  int64_t tokens, S;

  // Size of an accumulator with one entry per slot: S rounded up to whole vectors.
  int64_t padded() const { return (S + W - 1) / W * W; }

  // Calls body(s, count) for slots [s, s + count), count <= width.
  template <typename Body>
  void each_vector(Body&& body) const {
    int64_t s = 0;
    for (; s + W <= S; s += W) body(s, W);
    if (s < S) body(s, S - s);
  }
};

template <typename T>
void slots_softmax(const Rows<T>& rows, const T* in, T* out) {
  constexpr T kLow = -std::numeric_limits<T>::infinity();
  for (int64_t t = 0; t < rows.tokens; ++t, in += rows.S, out += rows.S) {
    Vec<T> high = splat(kLow);
    rows.each_vector(
        [&](int64_t s, int64_t count) { high = max<T>(get(in + s, count, kLow), high); });
    T lanes[kWidth<T>];
    store(lanes, high);
    high = softmax_shift<T>(splat(*std::max_element(lanes, lanes + kWidth<T>)));
    Vec<T> total{};
    rows.each_vector([&](int64_t s, int64_t count) {
      const Vec<T> e = exp_negative(get(in + s, count, kLow) - high);
      put(out + s, e, count);
      total += e;
    });
    const Vec<T> by = softmax_scale<T>(splat(sum<T>(total)));
    rows.each_vector(
        [&](int64_t s, int64_t count) { put(out + s, get(out + s, count, T{0}) * by, count); });
  }
}

// Softmax over the tokens. `high` and `total` are scratch of padded() entries, for the maximum and
// the sum of each slot.
template <typename T>
void tokens_softmax(const Rows<T>& rows, const T* in, T* out, T* high, T* total) {
  constexpr T kLow = -std::numeric_limits<T>::infinity();
  const int64_t S = rows.S, padded = rows.padded();
  std::fill(high, high + padded, kLow);
  std::fill(total, total + padded, T{0});
  for (int64_t t = 0; t < rows.tokens; ++t) {
    rows.each_vector([&](int64_t s, int64_t count) {
      store(high + s, max<T>(get(in + t * S + s, count, kLow), load(high + s)));
    });
  }
  for (int64_t s = 0; s < padded; s += kWidth<T>) store(high + s, softmax_shift<T>(load(high + s)));
  for (int64_t t = 0; t < rows.tokens; ++t) {
    rows.each_vector([&](int64_t s, int64_t count) {
      const Vec<T> e = exp_negative(get(in + t * S + s, count, kLow) - load(high + s));
      put(out + t * S + s, e, count);
      store(total + s, load(total + s) + e);
    });
  }
  for (int64_t s = 0; s < padded; s += kWidth<T>)
    store(total + s, softmax_scale<T>(load(total + s)));
  for (int64_t t = 0; t < rows.tokens; ++t) {
    rows.each_vector([&](int64_t s, int64_t count) {
      put(out + t * S + s, get(out + t * S + s, count, T{0}) * load(total + s), count);
    });
  }
}

template <typename T>
void slots_softmax_backward(const Rows<T>& rows, const T* w, T* d) {
  for (int64_t t = 0; t < rows.tokens; ++t, w += rows.S, d += rows.S) {
    Vec<T> total{};
    rows.each_vector([&](int64_t s, int64_t count) {
      total = fma(get(w + s, count, T{0}), get(d + s, count, T{0}), total);
    });
    const Vec<T> mean = splat(sum<T>(total));
    rows.each_vector([&](int64_t s, int64_t count) {
      put(d + s, get(w + s, count, T{0}) * (get(d + s, count, T{0}) - mean), count);
    });
  }
}

// Gradient of tokens_softmax, in place in d. `mean` is scratch of padded() entries.
template <typename T>
void tokens_softmax_backward(const Rows<T>& rows, const T* w, T* d, T* mean) {
  const int64_t S = rows.S;
  std::fill(mean, mean + rows.padded(), T{0});
  for (int64_t t = 0; t < rows.tokens; ++t) {
    rows.each_vector([&](int64_t s, int64_t count) {
      const int64_t i = t * S + s;
      const Vec<T> product = get(w + i, count, T{0}) * get(d + i, count, T{0});
      store(mean + s, load(mean + s) + product);
    });
  }
  for (int64_t t = 0; t < rows.tokens; ++t) {
    rows.each_vector([&](int64_t s, int64_t count) {
      const int64_t i = t * S + s;
      const Vec<T> away = get(d + i, count, T{0}) - load(mean + s);
      put(d + i, get(w + i, count, T{0}) * away, count);
    });
  }
}

}  // namespace

template <typename T>
void soft_mix(
    const T* logits, T* weights, int64_t tokens, int64_t S, bool over_tokens, int64_t group_begin,
    int64_t group_end) {
  const Rows<T> rows{tokens, S};
  std::vector<T> high(rows.padded()), total(rows.padded());
  for (int64_t g = group_begin; g < group_end; ++g) {
    const T* in = logits + g * tokens * S;
    T* out = weights + g * tokens * S;
    if (over_tokens) {
      tokens_softmax(rows, in, out, high.data(), total.data());
    } else {
      slots_softmax(rows, in, out);
    }
  }
}

template <typename T>
void soft_mix_backward(
    const T* weights, T* grad, int64_t tokens, int64_t S, bool over_tokens, int64_t group_begin,
    int64_t group_end) {
  const Rows<T> rows{tokens, S};
  std::vector<T> mean(rows.padded());
  for (int64_t g = group_begin; g < group_end; ++g) {
    const T* w = weights + g * tokens * S;
    T* d = grad + g * tokens * S;
    if (over_tokens) {
      tokens_softmax_backward(rows, w, d, mean.data());
    } else {
      slots_softmax_backward(rows, w, d);
    }
  }
}

template void soft_mix(const float*, float*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix(const double*, double*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix_backward(const float*, float*, int64_t, int64_t, bool, int64_t, int64_t);
template void soft_mix_backward(const double*, double*, int64_t, int64_t, bool, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
