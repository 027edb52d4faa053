// select -- picks of a row in order, one after another; rows side by side: leaders.h, keys.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../order.h"

namespace vmoe::cpu::VMOE_ISA {

// Sorts n picks that are in ascending order of index: radix passes from the lowest byte
// up, which are stable, so that ties need no comparison. `scratch` has room for n.
template <typename Key>
void sort_picks(Pick<Key>* picks, Pick<Key>* scratch, int64_t n) {
  constexpr int64_t kComparing = 64;  // below, clearing the counters costs more
  if (n < kComparing) {
    std::sort(picks, picks + n, [](const auto& a, const auto& b) { return a.before(b); });
    return;
  }
  constexpr int kBytes = sizeof(Key);
  const auto digit = [](Key key, int byte) { return ~(key >> (8 * byte)) & 0xFF; };
  int32_t starts[kBytes][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int byte = 0; byte < kBytes; ++byte) ++starts[byte][digit(picks[i].key, byte)];
  }
  Pick<Key>*from = picks, *to = scratch;
  for (int byte = 0; byte < kBytes; ++byte) {
    int32_t* start = starts[byte];
    if (start[digit(from[0].key, byte)] == n) continue;  // all keys share this byte
    int32_t total = 0;
    for (int value = 0; value < 256; ++value) total += std::exchange(start[value], total);
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i].key, byte)]++] = from[i];
    std::swap(from, to);
  }
  if (from != picks) std::copy(from, from + n, picks);
}

// All of value[0, n), in order, in picks[0, n). `picks` is scratch that a caller keeps.
template <typename T>
void sort_all(const T* value, int64_t n, std::vector<Pick<OrderKey<T>>>& picks) {
  picks.resize(2 * n);  // the second half is the sort's scratch
  for (int64_t i = 0; i < n; ++i) picks[i] = {order_key(value[i]), static_cast<int32_t>(i)};
  sort_picks(picks.data(), picks.data() + n, n);
}

// The k first of value[0, n), in order, in picks[0, k), by insertion: for small k.
template <typename T>
void select_few(const T* value, int64_t n, int64_t k, std::vector<Pick<OrderKey<T>>>& picks) {
  using P = Pick<OrderKey<T>>;
  const auto first = [](const P& a, const P& b) { return a.before(b); };
  picks.clear();
  for (int64_t i = 0; i < n; ++i) {
    const P pick{order_key(value[i]), static_cast<int32_t>(i)};
    if (static_cast<int64_t>(picks.size()) == k) {
      // Indices only grow, so a tie with the last pick never enters.
      if (pick.key <= picks.back().key) continue;
      picks.pop_back();
    }
    picks.insert(std::upper_bound(picks.begin(), picks.end(), pick, first), pick);
  }
}

}  // namespace vmoe::cpu::VMOE_ISA
