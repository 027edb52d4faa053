#include "../softmax_topk.h"

#include "../topk.h"
#include "leaders.h"
#include "softmax.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

template <typename T>
constexpr T kAbsent = -std::numeric_limits<T>::infinity();

template <typename T>
struct Chosen {
  T* values;         // [rows, k]
  int32_t* indices;  // [rows, k]
  int64_t k;
};

// Writes the k largest gates of the `count` rows in `softmax` to the rows from `row` on.
template <typename T, int K = 1>
void few(const RowSoftmax<T>& softmax, const Chosen<T>& out, int64_t row, int64_t count) {
  if constexpr (K < kFew) {
    if (out.k > K) return few<T, K + 1>(softmax, out, row, count);
  }
  // Gates are not negative, so their bits are their keys. In a row of NaN, all gates get the key
  // -1, so they tie. The bits of -1 are a NaN.
  using Keys = Vec<SignedKey<T>>;
  const Keys undefined = softmax.undefined();
  Leaders<T, K> leaders;
  for (int64_t e = 0; e < softmax.size(); ++e) {
    leaders.insert((Keys)softmax.gate(e) | undefined, e);
  }
  const Keys absent = softmax.absent();
  for (int j = 0; j < K; ++j) {
    T value[kWidth<T>];
    SignedKey<T> place[kWidth<T>];
    store(value, (Vec<T>)leaders.key(j));
    store(place, leaders.place(j) | absent);  // -1 if masked
    for (int64_t i = 0; i < count; ++i) {
      out.values[(row + i) * K + j] = value[i];
      out.indices[(row + i) * K + j] = static_cast<int32_t>(place[i]);
    }
  }
}

// Writes the gates as rows [count, E], the layout that topk takes.
template <typename T>
void put_rows(const RowSoftmax<T>& softmax, T* gates, int64_t count) {
  constexpr int64_t W = kWidth<T>;
  const int64_t E = softmax.size();
  for (int64_t e = 0; e < E; e += W) {
    Vec<T> block[W] = {};
    for (int64_t j = 0; j < std::min(W, E - e); ++j) {
      block[j] = softmax.absent() ? splat(kAbsent<T>) : softmax.gate(e + j);
    }
    transpose<T>(block);
    for (int64_t r = 0; r < count; ++r) put(gates + r * E + e, block[r], E - e);
  }
}

// Replaces picks of masked tokens by index -1 and value 0, in rows [begin, end).
template <typename T>
void take_back_absent(const Chosen<T>& chosen, int64_t begin, int64_t end) {
  for (int64_t i = begin * chosen.k; i < end * chosen.k; ++i) {
    if (chosen.values[i] != kAbsent<T>) continue;
    chosen.values[i] = 0;
    chosen.indices[i] = -1;
  }
}

}  // namespace

template <typename T>
void softmax_topk(
    const T* logits, T* values, int32_t* indices, T* high, T* scale, int64_t E, int64_t k,
    int64_t begin, int64_t end) {
  constexpr int64_t W = kWidth<T>;
  const Chosen<T> chosen{values, indices, k};
  RowSoftmax<T> softmax(E);
  const Buffer<T> gates(k > kFew ? W * E : 0);
  for (int64_t t = begin; t < end; t += W) {
    const int64_t count = std::min(W, end - t);
    softmax.read(logits + t * E, count, logits + end * E);
    put(high + t, softmax.high(), count);
    put(scale + t, softmax.scale(), count);
    if (k > kFew) {
      put_rows(softmax, gates.get(), count);
      topk(gates.get(), values + t * k, indices + t * k, E, 1, k, 0, count);
      take_back_absent(chosen, t, t + count);
    } else if (k > 0) {
      few(softmax, chosen, t, count);
    }
  }
}

template <typename T>
void softmax_gates(
    const T* logits, T* gates, T* high, T* scale, int64_t tokens, int64_t E, bool by_expert,
    int64_t begin, int64_t end) {
  constexpr int64_t W = kWidth<T>;
  RowSoftmax<T> softmax(E);
  for (int64_t t = begin; t < end;) {
    const int64_t group_end = (t / tokens + 1) * tokens;
    const int64_t count = std::min({W, end - t, by_expert ? group_end - t : W});
    softmax.read(logits + t * E, count, logits + end * E);
    put(high + t, softmax.high(), count);
    put(scale + t, softmax.scale(), count);
    if (by_expert) {
      T* column = gates + t / tokens * E * tokens + t % tokens;
      for (int64_t e = 0; e < E; ++e) {
        const Vec<T> gate = softmax.absent() ? splat(kAbsent<T>) : softmax.gate(e);
        put(column + e * tokens, gate, count);
      }
    } else {
      put_rows(softmax, gates + t * E, count);
    }
    t += count;
  }
}

template <typename T>
void softmax_choose(
    const T* gates, T* values, int32_t* indices, int64_t tokens, int64_t E, int64_t k,
    bool by_expert, int64_t begin, int64_t end) {
  topk(gates, values, indices, tokens, by_expert ? 1 : E, k, begin, end);
  take_back_absent(Chosen<T>{values, indices, k}, begin, end);
}

template void softmax_topk(
    const float*, float*, int32_t*, float*, float*, int64_t, int64_t, int64_t, int64_t);
template void softmax_topk(
    const double*, double*, int32_t*, double*, double*, int64_t, int64_t, int64_t, int64_t);
template void softmax_gates(
    const float*, float*, float*, float*, int64_t, int64_t, bool, int64_t, int64_t);
template void softmax_gates(
    const double*, double*, double*, double*, int64_t, int64_t, bool, int64_t, int64_t);
template void softmax_choose(
    const float*, float*, int32_t*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);
template void softmax_choose(
    const double*, double*, int32_t*, int64_t, int64_t, int64_t, bool, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
