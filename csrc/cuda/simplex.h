// simplex -- projection onto the simplex with at most k non-zeros, by a team of threads (team.h).
// Both ksparse ops use it; ksparse_projection.h has the formula.
#pragma once

#include "../common/order.h"
#include "team.h"

namespace vmoe::cuda {

// A projection in compact form, from which share() computes any entry. The k picks are the entries
// with a key above `cut`, and the entries with key `cut` up to index `last`. tau is NaN if there is
// no projection.
template <typename Key>
struct Projection {
  double largest, tau;
  Key cut;
  int64_t last;

  // Entry i of the projection of values / scale. The largest value is subtracted before the
  // division, which avoids cancellation if all values are large.
  template <typename T>
  __device__ double share(T value, int64_t i, double scale) const {
    const Key key = order_key(value);
    if (key < cut || (key == cut && i > last)) return 0;
    const double share = (static_cast<double>(value) - largest) / scale - tau;
    return share > 0 ? share : 0;
  }
};

// Projects the n entries value_at(i) / scale, 1 <= k <= n. Bisection between the smallest and the
// largest key finds the cut: the key with k keys at or above it. Each step counts the keys at or
// above the middle.
template <typename Team, typename ValueAt>
__device__ auto project(const Team& team, int64_t n, int64_t k, double scale, ValueAt&& value_at) {
  using T = decltype(value_at(0));
  using Key = OrderKey<T>;
  const auto key_at = [&](int64_t i) { return order_key(value_at(i)); };
  const auto count = [&](auto&& counts) {
    return join_all(team, n, int32_t{0}, Sum{}, [&](int64_t i) { return int32_t{counts(i)}; });
  };
  Key low = join_all(team, n, ~Key{0}, Least{}, key_at);
  Key high = join_all(team, n, Key{0}, Largest{}, key_at);
  int64_t from_low = n, above_high = 0;  // number of keys >= low, number of keys > high
  while (from_low > k && low < high) {
    const Key middle = low + (high - low + 1) / 2;
    const int32_t from_middle = count([&](int64_t i) { return key_at(i) >= middle; });
    if (from_middle >= k) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle - 1;
      above_high = from_middle;
    }
  }
  Projection<Key> projection{0, kUndefined, low, n - 1};
  if (from_low > k) {  // more keys tie with the k-th than fit: take the first `ties` of them
    const int64_t ties = k - above_high;
    int64_t first = 0;
    while (first < projection.last) {
      const int64_t middle = (first + projection.last) / 2;
      if (count([&](int64_t i) { return i <= middle && key_at(i) == low; }) >= ties) {
        projection.last = middle;
      } else {
        first = middle + 1;
      }
    }
  }

  projection.largest = join_all(
      team, n, -kInfinity, Largest{}, [&](int64_t i) { return static_cast<double>(value_at(i)); });
  // Finds tau without sorting. u is the entry minus the largest entry, divided by `scale`. Each
  // round removes the entries at or below the threshold, and computes the threshold of the
  // remaining entries, until no entry is removed. No share exceeds 1, so tau is at least -1, which
  // is the first threshold. A u that is NaN is not above any threshold.
  double threshold = -1;
  for (int32_t support = 0;;) {
    double sum = 0;
    int32_t above = 0;
    for (int64_t i = team.rank(); i < n; i += team.size()) {
      const T value = value_at(i);
      const Key key = order_key(value);
      if (key < low || (key == low && i > projection.last)) continue;
      const double u = (static_cast<double>(value) - projection.largest) / scale;
      if (!(u > threshold)) continue;
      sum += u;
      ++above;
    }
    above = team.join(above, Sum{});
    if (above == support || above == 0) return projection;
    support = above;
    threshold = projection.tau = (team.join(sum, Sum{}) - 1) / static_cast<double>(above);
  }
}

}  // namespace vmoe::cuda
