// simplex -- projection onto the simplex with at most k non-zeros, by a team of threads (team.h).
// Both ksparse ops use this projection. ksparse_projection.h has the formula.
//
// Most of the work is counting the entries at or above a value. Values are compared, not keys: a
// comparison of float64 values is one instruction, and a key takes six.
#pragma once

#include "../common/order.h"
#include "team.h"

namespace vmoe::cuda {

// A projection in compact form, from which share() computes any entry. The k picks are the entries
// above `cut`, and the entries equal to `cut` up to index `last`. tau is NaN if there is no
// projection.
template <typename T>
struct Projection {
  double largest, tau;
  T cut;
  int64_t last;

  __device__ bool picks(T value, int64_t i) const {
    return value > cut || (value == cut && i <= last);
  }
  // The entry of the projection of values / scale for a pick. The largest value is subtracted
  // before the division, which avoids cancellation if all values are large.
  __device__ double share_of_pick(T value, double scale) const {
    const double share = (static_cast<double>(value) - largest) / scale - tau;
    return share > 0 ? share : 0;
  }
  __device__ double share(T value, int64_t i, double scale) const {
    return picks(value, i) ? share_of_pick(value, scale) : 0;
  }
};

// A guess of the cut. `cut` is the cut of earlier values of the entries, and `reach` is about the
// largest change of an entry since then. If `cut` is not finite, there is no guess.
template <typename T>
struct Guess {
  T cut, reach;
};

// The entries value_at(i), i < n, of a row, divided among the threads of a team.
template <typename Team, typename ValueAt>
struct Entries {
  static constexpr bool kHasNan = true;
  const Team& team;
  int64_t n;
  ValueAt value_at;

  // Calls body(i, value) for every entry of this thread, in ascending order.
  template <typename Body>
  __device__ void each(Body&& body) const {
    for (int64_t i = team.rank(); i < n; i += team.size()) body(i, value_at(i));
  }
  // Returns a function that calls its argument, body(i, value), for every pick of this thread.
  template <typename T>
  __device__ auto picks_of(const Projection<T>& projection) const {
    return [this, projection](auto&& body) {
      each([&](int64_t i, T value) {
        if (projection.picks(value, i)) body(i, value);
      });
    };
  }
};

// Up to kEach entries per thread without NaN, which the threads keep in registers. The registers
// after the end of the row hold -inf. Such an entry is not a pick, and is not above any value.
template <typename T, int kEach, typename Team, typename ValueAt>
struct HeldEntries {
  static constexpr bool kHasNan = false;
  const Team& team;
  int n;
  ValueAt value_at;
  T values[kEach];

  __device__ HeldEntries(const Team& team_, int n_, ValueAt value_at_)
      : team(team_), n(n_), value_at(value_at_) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      values[j] = index(j) < n ? value_at(index(j)) : static_cast<T>(-kInfinity);
    }
  }
  __device__ int index(int j) const { return team.rank() + j * team.size(); }

  template <typename Body>
  __device__ void each(Body&& body) const {
#pragma unroll
    for (int j = 0; j < kEach; ++j) body(index(j), values[j]);
  }
  __device__ auto picks_of(const Projection<T>& projection) const {
    const auto last = static_cast<int>(projection.last);
    unsigned picks = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const bool above = values[j] > projection.cut;
      const bool ties = (values[j] == projection.cut) & (index(j) <= last);
      picks |= static_cast<unsigned>(above | ties) << j;
    }
    // Most threads have at most one pick, so a loop over the picks takes fewer turns than a loop
    // over all entries.
    return [this, picks](auto&& body) {
      for (unsigned left = picks; left != 0; left &= left - 1) {
        const int i = index(__ffs(static_cast<int>(left)) - 1);
        body(i, value_at(i));
      }
    };
  }
};

// Projects entries / scale, 1 <= k <= n. Bisection on the keys of the entries (order.h) finds the
// cut, which has k entries at or above it. Each step counts the entries at or above the middle.
template <typename T, typename Team, typename Row>
__device__ Projection<T> project(
    const Team& team, const Row& row, int64_t n, int64_t k, double scale, Guess<T> guess) {
  using Key = OrderKey<T>;
  const auto count = [&](auto&& counts) {
    int32_t found = 0;
    row.each([&](int64_t i, T value) { found += counts(i, value); });
    return team.join(found, Sum{});
  };
  T largest = static_cast<T>(-kInfinity);
  row.each([&](int64_t, T value) {
    if constexpr (Row::kHasNan) {
      largest = Largest{}(largest, value);
    } else {
      largest = value > largest ? value : largest;
    }
  });
  largest = team.join(largest, Largest{});
  Key low = order_key(static_cast<T>(-kInfinity)), high = order_key(largest);
  int64_t from_low = n, above_high = 0;  // number of keys >= low, number of keys > high
  const auto narrow = [&](Key middle) {
    const T least = value_of(middle);
    const int32_t from_middle = count([=](int64_t, T value) { return value >= least; });
    if (from_middle >= k) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle - 1;
      above_high = from_middle;
    }
    return from_middle;
  };
  if (guess.cut - guess.cut == 0) {
    const int32_t from_guess = narrow(order_key(guess.cut));
    if (from_guess != k) {
      const T reach = from_guess > k ? guess.reach : -guess.reach;
      narrow(order_key(guess.cut + reach));
    }
  } else {
    T least = static_cast<T>(kInfinity);
    row.each([&](int64_t, T value) { least = Least{}(least, value); });
    low = order_key(team.join(least, Least{}));
  }
  while (from_low > k && low < high) narrow(low + (high - low + 1) / 2);

  Projection<T> projection{static_cast<double>(largest), kUndefined, value_of(low), n - 1};
  if (from_low > k) {  // more entries tie with the k-th than fit: take the first `ties` of them
    const int64_t ties = k - above_high;
    int64_t first = 0;
    while (first < projection.last) {
      const int64_t middle = (first + projection.last) / 2;
      const auto is_tie = [&](int64_t i, T value) {
        return i <= middle && value == projection.cut;
      };
      if (count(is_tie) >= ties) {
        projection.last = middle;
      } else {
        first = middle + 1;
      }
    }
  }

  // Finds tau without sorting. u is the entry minus the largest entry, divided by `scale`. Each
  // round removes the entries at or below the threshold, and computes the threshold of the
  // remaining entries. The rounds end with the first round that removes no entry. No share exceeds
  // 1, so tau is at least -1, which is the first threshold. A u that is NaN is not above any
  // threshold.
  const auto picks = row.picks_of(projection);
  double threshold = -1;
  for (int32_t support = 0;;) {
    double sum = 0;
    int32_t above = 0;
    picks([&](int64_t, T value) {
      const double u = (static_cast<double>(value) - projection.largest) / scale;
      if (!(u > threshold)) return;
      sum += u;
      ++above;
    });
    above = team.join(above, Sum{});
    if (above == support || above == 0) return projection;
    support = above;
    threshold = projection.tau = (team.join(sum, Sum{}) - 1) / static_cast<double>(above);
  }
}

}  // namespace vmoe::cuda
