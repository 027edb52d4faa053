// simplex -- the projection onto the simplex with at most k non-zeros, by a team of threads; for
// the two ksparse ops.
#pragma once

#include "../common/order.h"
#include "team.h"

namespace vmoe::cuda {

// The state from which each entry's share follows. The picks are the entries with a key above the
// cut, and those with the key of the cut up to index `last`. tau is NaN if there is no projection.
template <typename Key>
struct Projection {
  double largest, tau;
  Key cut;
  int64_t last;

  // Share of entry i, at least 0. Entries are read as (value - largest) / scale: subtracting the
  // largest first avoids cancellation if all values are large.
  template <typename T>
  __device__ double share(T value, int64_t i, double scale) const {
    const Key key = order_key(value);
    if (key < cut || (key == cut && i > last)) return 0;
    const double share = (static_cast<double>(value) - largest) / scale - tau;
    return share > 0 ? share : 0;
  }
};

// Projects the n entries value_at(i), 1 <= k <= n. The cut is bisected between the least and the
// largest key until k keys are on or above it. That takes about ten counts, and one per bit of a
// key only if entries tie.
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
  int64_t from_low = n, above_high = 0;  // the numbers of keys >= low and > high
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
  if (from_low > k) {  // more keys tie with the k-th than fit: the first `ties` of them stay
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
  // Removes entries at or below the threshold until none is left to remove; usually all stay at
  // once. This needs no sorting. No share exceeds 1, so the threshold is at least the largest
  // entry minus 1. A difference that is NaN is never above the threshold.
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
