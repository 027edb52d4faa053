#include "../softmax_gather.h"

#include "softmax.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The logits [G, T, E] as the rows of indices see them.
struct Picks {
  int64_t tokens, E;
  bool by_expert;

  int64_t places() const { return by_expert ? tokens : E; }  // of an index
  int64_t token(int64_t row, int64_t index) const {
    return by_expert ? row / E * tokens + index : row;
  }
  int64_t expert(int64_t row, int64_t index) const { return by_expert ? row % E : index; }
};

}  // namespace

template <typename T>
void softmax_norms(
    const T* logits, T* high, T* scale, int64_t E, int64_t begin, int64_t end) {
  constexpr int64_t W = kWidth<T>;
  RowSoftmax<T> softmax(E);
  for (int64_t t = begin; t < end; t += W) {
    const int64_t count = std::min(W, end - t);
    softmax.read(logits + t * E, count, logits + end * E);
    put(high + t, softmax.high(), count);
    put(scale + t, softmax.scale(), count);
  }
}

template <typename T>
void softmax_gather(
    const T* logits, const int32_t* indices, const T* high, const T* scale, T* values,
    int64_t tokens, int64_t E, int64_t K, bool by_expert, int64_t row_begin, int64_t row_end) {
  constexpr int64_t W = kWidth<T>;
  const Picks picks{tokens, E, by_expert};
  int64_t row = row_begin, j = 0;
  // A vector of picks at a time, whichever rows they are of.
  for (int64_t i = row_begin * K; i < row_end * K; i += W) {
    const int64_t count = std::min(W, row_end * K - i);
    T entry[W] = {}, shift[W] = {}, by[W] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      const int32_t index = indices[i + lane];
      if (index >= 0 && index < picks.places()) {
        const int64_t t = picks.token(row, index);
        entry[lane] = logits[t * E + picks.expert(row, index)];
        shift[lane] = high[t];
        by[lane] = scale[t];
      }
      if (++j == K) {
        j = 0;
        ++row;
      }
    }
    put(values + i, exp(load(entry) - load(shift)) * load(by), count);
  }
}

template <typename T>
void softmax_scatter(
    const T* grad, const int32_t* indices, T* grad_gates, int64_t tokens, int64_t E, int64_t K,
    bool by_expert, int64_t row_begin, int64_t row_end) {
  const Picks picks{tokens, E, by_expert};
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t i = row * K; i < (row + 1) * K; ++i) {
      if (indices[i] < 0 || indices[i] >= picks.places()) continue;
      grad_gates[picks.token(row, indices[i]) * E + picks.expert(row, indices[i])] += grad[i];
    }
  }
}

template <typename T>
void softmax_gather_backward(
    const T* logits, const T* high, const T* scale, T* grad, int64_t E, int64_t begin,
    int64_t end) {
  constexpr int64_t W = kWidth<T>;
  constexpr T kLow = -std::numeric_limits<T>::infinity();  // behind the row's end: gates of 0
  const std::unique_ptr<T[]> gates(new T[E + W]);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = logits + t * E;
    T* d = grad + t * E;
    const Vec<T> shift = splat(high[t]), by = splat(scale[t]);
    Vec<T> total{};
    for (int64_t e = 0; e < E; e += W) {
      const Vec<T> gate = exp(get(row + e, E - e, kLow) - shift) * by;
      store(gates.get() + e, gate);
      total = fma(gate, get(d + e, E - e, T{0}), total);
    }
    const Vec<T> mean = splat(sum<T>(total));
    for (int64_t e = 0; e < E; e += W) {
      put(d + e, load(gates.get() + e) * (get(d + e, E - e, T{0}) - mean), E - e);
    }
  }
}

template void softmax_norms(const float*, float*, float*, int64_t, int64_t, int64_t);
template void softmax_norms(const double*, double*, double*, int64_t, int64_t, int64_t);
template void softmax_gather(
    const float*, const int32_t*, const float*, const float*, float*, int64_t, int64_t, int64_t,
    bool, int64_t, int64_t);
template void softmax_gather(
    const double*, const int32_t*, const double*, const double*, double*, int64_t, int64_t, int64_t,
    bool, int64_t, int64_t);
template void softmax_scatter(
    const float*, const int32_t*, float*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);
template void softmax_scatter(
    const double*, const int32_t*, double*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);
template void softmax_gather_backward(
    const float*, const float*, const float*, float*, int64_t, int64_t, int64_t);
template void softmax_gather_backward(
    const double*, const double*, const double*, double*, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
