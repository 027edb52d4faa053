// select -- the k first picks of a row, shared by every op that selects.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../order.h"

namespace vmoe::cpu::VMOE_ISA {

// Leaves the k first of value[0], value[stride], ... (n of them) in picks[0, k),
// in order. `picks` is scratch that a caller keeps between rows.
template <typename T>
void select(
    const T* value, int64_t stride, int64_t n, int64_t k, std::vector<Pick<OrderKey<T>>>& picks) {
  using P = Pick<OrderKey<T>>;
  const auto first = [](const P& a, const P& b) { return a.before(b); };
  picks.clear();
  if (k <= 0) return;
  // Few picks (experts of a token): insertion into a sorted list that stays in
  // registers or L1. Many (tokens of an expert): quickselect, then sort the k.
  constexpr int64_t kInsertion = 8;
  if (k <= kInsertion) {
    for (int64_t i = 0; i < n; ++i) {
      const P pick{order_key(value[i * stride]), static_cast<int32_t>(i)};
      if (static_cast<int64_t>(picks.size()) == k) {
        // Indices only grow, so a tie with the last pick never enters.
        if (pick.key <= picks.back().key) continue;
        picks.pop_back();
      }
      picks.insert(std::upper_bound(picks.begin(), picks.end(), pick, first), pick);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    picks.push_back({order_key(value[i * stride]), static_cast<int32_t>(i)});
  }
  if (k < n) {
    std::nth_element(picks.begin(), picks.begin() + k, picks.end(), first);
    picks.resize(k);
  }
  std::sort(picks.begin(), picks.end(), first);
}

}  // namespace vmoe::cpu::VMOE_ISA
