// token_rows -- iterates over slots and the rows of their tokens.
#pragma once

#include <cstdint>

#include "../common/slots.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename Row>
struct TokenRow {
  const Row* from;  // null: the slot is empty
  int64_t slot;     // in [G, E, C], flat
};

// Iterates over the slots [begin, end) of [E, G, C]. Rows are prefetched two slots ahead, because
// the tokens of an expert are scattered and no hardware prefetcher predicts them.
template <typename Row>
class TokenRows {
 public:
  TokenRows(
      const Row* x, const int32_t* token, const Slots& shape, int64_t D, int64_t begin, int64_t end)
      : x_(x),
        token_(token),
        shape_(shape),
        D_(D),
        coming_(begin),
        end_(end),
        next_(ask()),
        after_next_(ask()) {}

  TokenRow<Row> next() {
    const TokenRow<Row> row = next_;
    next_ = after_next_;
    after_next_ = ask();
    return row;
  }

 private:
  TokenRow<Row> ask() {
    if (coming_ >= end_) return {};
    const SlotRow at = shape_.at(coming_++);
    const int32_t t = token_[at.slot];
    if (t < 0 || t >= shape_.tokens) return {nullptr, at.slot};
    const Row* from = x_ + (at.group * shape_.tokens + t) * D_;
    for (int64_t d = 0; d < D_; d += 64 / sizeof(Row)) __builtin_prefetch(from + d);
    return {from, at.slot};
  }

  const Row* x_;          // [G, T, D]
  const int32_t* token_;  // [G, E, C]
  Slots shape_;
  int64_t D_, coming_, end_;
  TokenRow<Row> next_, after_next_;
};

}  // namespace vmoe::cpu::VMOE_ISA
