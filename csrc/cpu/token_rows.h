// token_rows -- the rows that slots take from their tokens, one slot after another.
#pragma once

#include <cstdint>

#include "../common/slot_row.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename Row>
struct TokenRow {
  const Row* from;  // null: the slot is empty
  int64_t slot;     // as in [G, E, C]
};

// The slots in [begin, end) of [E, G, C]. A row is asked for two slots before its turn: the tokens
// of an expert lie anywhere, and no hardware foresees the next.
template <typename Row>
class TokenRows {
 public:
  TokenRows(
      const Row* x, const int32_t* token, int64_t G, int64_t tokens, int64_t E, int64_t C,
      int64_t D, int64_t begin, int64_t end)
      : x_(x),
        token_(token),
        G_(G),
        tokens_(tokens),
        E_(E),
        C_(C),
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
    const SlotRow at = slot_of_row(coming_++, G_, E_, C_);
    const int32_t t = token_[at.slot];
    if (t < 0 || t >= tokens_) return {nullptr, at.slot};
    const Row* from = x_ + (at.group * tokens_ + t) * D_;
    for (int64_t d = 0; d < D_; d += 64 / sizeof(Row)) __builtin_prefetch(from + d);
    return {from, at.slot};
  }

  const Row* x_;          // [G, T, D]
  const int32_t* token_;  // [G, E, C]
  int64_t G_, tokens_, E_, C_, D_, coming_, end_;
  TokenRow<Row> next_, after_next_;
};

}  // namespace vmoe::cpu::VMOE_ISA
