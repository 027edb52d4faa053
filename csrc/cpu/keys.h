// keys -- the keys of order.h as vectors, and the search for the k-th key.
//
// Keys in this file are signed, because every ISA level compares signed lanes. A signed key is
// order_key with its top bit flipped. No value has the lowest signed integer as its key.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../common/order.h"
#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename T>
using SignedKey = typename IntOf<T>::type;

template <typename T>
constexpr SignedKey<T> kNoKey = std::numeric_limits<SignedKey<T>>::min();

template <typename T>
inline Vec<SignedKey<T>> signed_key(Vec<T> value) {
  using Keys = Vec<SignedKey<T>>;
  constexpr SignedKey<T> kLast = std::numeric_limits<SignedKey<T>>::max();
  const Keys bits = (Keys)(value + T{0});  // -0 becomes +0, so that -0 and +0 tie
  const Keys key = bits ^ ((bits < 0) & kLast);
  return value == value ? key : splat<SignedKey<T>>(kLast);
}

template <typename T>
inline OrderKey<T> unsigned_key(SignedKey<T> key) {
  return static_cast<OrderKey<T>>(key) ^ static_cast<OrderKey<T>>(kNoKey<T>);
}

// The cut of a row. The picks of the row are all keys above `key`, and the first `ties` keys equal
// to `key`.
template <typename Key>
struct Cut {
  Key key;
  int64_t ties;
};

template <typename Key>
inline int64_t count_from(Key key, const Key* keys, int64_t n) {
  Vec<Key> count{};
  for (int64_t i = 0; i < n; i += kWidth<Key>) count -= load(keys + i) >= splat(key);
  return sum<Key>(count);
}

// Returns the cut of n keys for k picks, 1 <= k <= n. All keys are in [low, high]. The function
// bisects [low, high]: each step counts the keys that are not below the middle. The candidates are
// the keys in the remaining range. Once at most half of the keys are candidates, the candidates are
// moved to `kept`. `keys` and `kept` have room for n keys rounded up to whole vectors, and for one
// more vector. `keys` is padded with kNoKey.
template <typename Key>
Cut<Key> find_cut(const Key* keys, int64_t n, int64_t k, Key low, Key high, Key* kept) {
  using Unsigned = std::make_unsigned_t<Key>;
  // Up to this number of keys, moving the candidates saves nothing.
  constexpr int64_t kFew = 8 * kWidth<Key>;
  int64_t from_low = n, above_high = 0;  // number of keys >= low, number of keys > high
  int64_t gone_above = 0;                // number of keys > high that are no longer in `keys`
  while (from_low > k && low < high) {
    const Unsigned half = (static_cast<Unsigned>(high) - static_cast<Unsigned>(low) + 1) / 2;
    const Key middle = static_cast<Key>(static_cast<Unsigned>(low) + half);
    const int64_t count = gone_above + count_from(middle, keys, n);
    if (count >= k) {
      low = middle;
      from_low = count;
    } else {
      high = middle - 1;
      above_high = count;
    }
    if (n > kFew && 2 * (from_low - above_high) <= n) {
      int64_t left = 0;
      for (int64_t i = 0; i < n; i += kWidth<Key>) {
        const Vec<Key> key = load(keys + i);
        left += compress<Key>(kept + left, (key >= splat(low)) & (key <= splat(high)), key);
      }
      store(kept + left, splat(std::numeric_limits<Key>::min()));
      keys = kept;
      n = left;
      gone_above = above_high;
    }
  }
  return {low, from_low == k ? k : k - above_high};
}

}  // namespace vmoe::cpu::VMOE_ISA
