#include "../softmax_gather.h"

#include "softmax.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Positions in logits [G, T, E] of the picks of one row of indices.
struct Row {
  int64_t first;   // position of index 0
  int64_t stride;  // distance between positions of consecutive indices
  int64_t places;  // indices in [0, places) are valid

  Row(int64_t row, int64_t tokens, int64_t E, bool by_expert)
      : first(by_expert ? row / E * tokens * E + row % E : row * E),
        stride(by_expert ? E : 1),
        places(by_expert ? tokens : E) {}

  bool picks(int32_t index) const { return index >= 0 && index < places; }
  int64_t place(int32_t index) const { return first + index * stride; }
};

}  // namespace

template <typename T>
void softmax_norms(const T* logits, T* high, T* scale, int64_t E, int64_t begin, int64_t end) {
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
  T entry[W] = {}, shift[W] = {}, by[W] = {};
  int64_t waiting = 0, done = row_begin * K;
  const auto write = [&] {  // a vector of picks, which may belong to several rows
    put(values + done, exp_negative(load(entry) - load(shift)) * load(by), waiting);
    done += waiting;
    waiting = 0;
  };
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Row row(r, tokens, E, by_expert);
    for (int64_t i = r * K; i < (r + 1) * K; ++i) {
      entry[waiting] = shift[waiting] = by[waiting] = 0;
      if (row.picks(indices[i])) {
        const int64_t place = row.place(indices[i]);
        const int64_t t = by_expert ? place / E : r;
        entry[waiting] = logits[place];
        shift[waiting] = high[t];
        by[waiting] = scale[t];
      }
      if (++waiting == W) write();
    }
  }
  if (waiting) write();
}

template <typename T>
void softmax_dots(
    const T* grad, const T* values, const int32_t* indices, T* dots, int64_t tokens, int64_t E,
    int64_t K, bool by_expert, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Row row(r, tokens, E, by_expert);
    // The dot of token 0 of the group by expert, else of token r.
    T* first = dots + (by_expert ? r / E * tokens : r);
    for (int64_t i = r * K; i < (r + 1) * K; ++i) {
      if (row.picks(indices[i])) first[by_expert ? indices[i] : 0] += grad[i] * values[i];
    }
  }
}

template <typename T>
void softmax_gather_backward(
    const T* logits, const T* high, const T* scale, const T* dots, T* grad_logits, int64_t E,
    int64_t begin, int64_t end) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = logits + t * E;
    T* out = grad_logits + t * E;
    const Vec<T> shift = splat(high[t]), by = splat(-dots[t] * scale[t]);
    int64_t e = 0;
    for (; e + W <= E; e += W) store(out + e, exp_negative(load(row + e) - shift) * by);
    if (e < E) {
      const Vec<T> rest = exp_negative(load_some(row + e, E - e, high[t]) - shift) * by;
      store_some(out + e, rest, E - e);
    }
  }
}

template <typename T>
void softmax_scatter(
    const T* grad, const T* values, const int32_t* indices, T* grad_logits, int64_t tokens,
    int64_t E, int64_t K, bool by_expert, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Row row(r, tokens, E, by_expert);
    for (int64_t i = r * K; i < (r + 1) * K; ++i) {
      if (row.picks(indices[i])) grad_logits[row.place(indices[i])] += grad[i] * values[i];
    }
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void softmax_norms(const T*, T*, T*, int64_t, int64_t, int64_t);                        \
  template void softmax_gather(                                                                    \
      const T*, const int32_t*, const T*, const T*, T*, int64_t, int64_t, int64_t, bool, int64_t,  \
      int64_t);                                                                                    \
  template void softmax_dots(                                                                      \
      const T*, const T*, const int32_t*, T*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);  \
  template void softmax_gather_backward(                                                           \
      const T*, const T*, const T*, const T*, T*, int64_t, int64_t, int64_t);                      \
  template void softmax_scatter(                                                                   \
      const T*, const T*, const int32_t*, T*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
