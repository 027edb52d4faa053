#include "../combine.h"

#include <algorithm>
#include <vector>

#include "../common/slots.h"
#include "half.h"
#include "token_rows.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Vectors of a row that are summed at the same time: enough independent sums to hide the latency of
// an fma.
constexpr int64_t kBlock = 4;

template <typename Row>
struct Weighted {
  const Row* row;
  Compute<Row> weight;
};

// out[d] = sum over `from` of weight * row[d]. Every out[d] is summed in the same order with the
// same fma. So the sum does not depend on the position d of the entry in the row.
template <bool kStream, typename Row>
void weighted_sum(const std::vector<Weighted<Row>>& from, Row* out, int64_t D) {
  using T = Compute<Row>;
  constexpr int64_t W = kWidth<T>;
  int64_t d = 0;
  for (; d + kBlock * W <= D; d += kBlock * W) {
    Vec<T> total[kBlock] = {};
    for (const auto& [row, weight] : from) {
      for (int64_t i = 0; i < kBlock; ++i) {
        total[i] = fma(splat(weight), load_wide(row + d + i * W), total[i]);
      }
    }
    for (int64_t i = 0; i < kBlock; ++i) store_narrow<kStream>(out + d + i * W, total[i]);
  }
  for (; d < D; d += W) {
    const int64_t count = D - d < W ? D - d : W;
    Vec<T> total{};
    for (const auto& [row, weight] : from) {
      const Vec<T> v = count < W ? load_wide(row + d, count) : load_wide(row + d);
      total = fma(splat(weight), v, total);
    }
    if (count < W) {
      store_narrow(out + d, total, count);
    } else {
      store_narrow<kStream>(out + d, total);
    }
  }
}

// to[d] = weight * from[d]. Returns the dot product of `from` and `y`. The dot product has kBlock
// partial sums, which are added as a tree.
template <bool kStream, typename Row>
Compute<Row> scale_and_dot(const Row* from, const Row* y, Compute<Row> weight, Row* to, int64_t D) {
  using T = Compute<Row>;
  constexpr int64_t W = kWidth<T>;
  Vec<T> dot[kBlock] = {};
  int64_t d = 0;
  for (; d + kBlock * W <= D; d += kBlock * W) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const Vec<T> v = load_wide(from + d + i * W);
      store_narrow<kStream>(to + d + i * W, splat(weight) * v);
      dot[i] = fma(v, load_wide(y + d + i * W), dot[i]);
    }
  }
  for (int64_t i = 0; d < D; d += W, ++i) {
    const int64_t count = D - d;
    if (count < W) {
      const Vec<T> v = load_wide(from + d, count);
      store_narrow(to + d, splat(weight) * v, count);
      dot[i] = fma(v, load_wide(y + d, count), dot[i]);
    } else {
      const Vec<T> v = load_wide(from + d);
      store_narrow<kStream>(to + d, splat(weight) * v);
      dot[i] = fma(v, load_wide(y + d), dot[i]);
    }
  }
  static_assert(kBlock == 4);
  return sum<T>((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

}  // namespace

template <typename Row>
void combine(
    const Row* y, const Compute<Row>* gate, const int32_t* offsets, const int32_t* slots, Row* out,
    const Slots& shape, int64_t D, int64_t row_begin, int64_t row_end) {
  const int64_t tokens = shape.tokens, S = shape.of_group();
  const bool past_caches = streams(out, shape.all_tokens(), D * sizeof(Row));
  std::vector<Weighted<Row>> from;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t g = row / tokens, t = row % tokens;
    const int32_t* start = offsets + g * (tokens + 1) + t;
    const int64_t begin = std::max(start[0], 0), end = std::min<int64_t>(start[1], S);
    from.clear();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = slots[g * S + i];
      if (s < 0 || s >= S) continue;
      from.push_back({y + shape.row(g, s) * D, gate ? gate[g * S + s] : 1});
    }
    if (past_caches) {
      weighted_sum<true>(from, out + row * D, D);
    } else {
      weighted_sum<false>(from, out + row * D, D);
    }
  }
  if (past_caches) finish_streams();
}

template <typename Row>
void combine_backward(
    const Row* grad_out, const Row* y, const Compute<Row>* gate, const int32_t* token, Row* grad_y,
    Compute<Row>* grad_gate, const Slots& shape, int64_t D, int64_t row_begin, int64_t row_end) {
  const bool past_caches = streams(grad_y, shape.all(), D * sizeof(Row));
  TokenRows<Row> rows(grad_out, token, shape, D, row_begin, row_end);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const auto [from, slot] = rows.next();
    Row* to = grad_y + row * D;
    if (from == nullptr) {
      std::fill(to, to + D, Row{});
      grad_gate[slot] = 0;
      continue;
    }
    grad_gate[slot] = past_caches ? scale_and_dot<true>(from, y + row * D, gate[slot], to, D)
                                  : scale_and_dot<false>(from, y + row * D, gate[slot], to, D);
  }
  if (past_caches) finish_streams();
}

#define VMOE_INSTANTIATE(Row)                                                                      \
  template void combine(                                                                           \
      const Row*, const Compute<Row>*, const int32_t*, const int32_t*, Row*, const Slots&,         \
      int64_t, int64_t, int64_t);                                                                  \
  template void combine_backward(                                                                  \
      const Row*, const Row*, const Compute<Row>*, const int32_t*, Row*, Compute<Row>*,            \
      const Slots&, int64_t, int64_t, int64_t);
VMOE_EACH_ROW(VMOE_INSTANTIATE)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
