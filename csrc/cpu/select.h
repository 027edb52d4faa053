// select -- sorted picks of one row by scalar code. leaders.h and keys.h select with vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../common/order.h"

namespace vmoe::cpu::VMOE_ISA {

// A radix sort by digits of kBits, the lowest first. A radix sort is stable, so ties need no
// comparison.
template <int kBits, typename Key>
void sort_by_digits(Pick<Key>* picks, Pick<Key>* scratch, int64_t n) {
  constexpr int kValues = 1 << kBits, kDigits = (8 * sizeof(Key) + kBits - 1) / kBits;
  const auto digit = [](Key key, int d) { return ~(key >> (kBits * d)) & (kValues - 1); };
  int32_t starts[kDigits][kValues] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int d = 0; d < kDigits; ++d) ++starts[d][digit(picks[i].key, d)];
  }
  Pick<Key>*from = picks, *to = scratch;
  for (int d = 0; d < kDigits; ++d) {
    int32_t* start = starts[d];
    if (start[digit(from[0].key, d)] == n) continue;  // all keys share this digit
    int32_t total = 0;
    for (int value = 0; value < kValues; ++value) total += std::exchange(start[value], total);
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i].key, d)]++] = from[i];
    std::swap(from, to);
  }
  if (from != picks) std::copy(from, from + n, picks);
}

// Sorts n picks that are in ascending order of index. `scratch` has room for n.
template <typename Key>
void sort_picks(Pick<Key>* picks, Pick<Key>* scratch, int64_t n) {
  // Below each of these numbers of picks, the counters of the next method cost more than they save.
  constexpr int64_t kComparing = 64, kBytes = 4096;
  if (n < kComparing) {
    std::sort(picks, picks + n, [](const auto& a, const auto& b) { return a.before(b); });
  } else if (n < kBytes) {
    sort_by_digits<8>(picks, scratch, n);
  } else {
    sort_by_digits<11>(picks, scratch, n);
  }
}

// Sorts value[0, n) into picks[0, n). The entries of `picks` from n on are scratch. A caller that
// keeps `picks` between calls saves allocations.
template <typename T>
void sort_all(const T* value, int64_t n, std::vector<Pick<OrderKey<T>>>& picks) {
  picks.resize(2 * n);  // the second half is the sort's scratch
  for (int64_t i = 0; i < n; ++i) picks[i] = {order_key(value[i]), static_cast<int32_t>(i)};
  sort_picks(picks.data(), picks.data() + n, n);
}

// Writes the first k of value[0, n), sorted, to picks[0, k). Inserts one value after another, which
// is fast if k is small.
template <typename T>
void select_few(const T* value, int64_t n, int64_t k, std::vector<Pick<OrderKey<T>>>& picks) {
  using P = Pick<OrderKey<T>>;
  const auto first = [](const P& a, const P& b) { return a.before(b); };
  picks.clear();
  for (int64_t i = 0; i < n; ++i) {
    const P pick{order_key(value[i]), static_cast<int32_t>(i)};
    if (static_cast<int64_t>(picks.size()) == k) {
      // Indices ascend, so a tie with the last pick is never inserted.
      if (pick.key <= picks.back().key) continue;
      picks.pop_back();
    }
    picks.insert(std::upper_bound(picks.begin(), picks.end(), pick, first), pick);
  }
}

}  // namespace vmoe::cpu::VMOE_ISA
