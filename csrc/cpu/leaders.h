// leaders -- the first K picks of several rows, one row per vector lane, updated entry by entry.
#pragma once

#include <cstdint>

#include "keys.h"

namespace vmoe::cpu::VMOE_ISA {

// The largest K. topk.cpp uses another method for more picks.
constexpr int kFew = 8;

template <typename T, int K>
class Leaders {
 public:
  using Keys = Vec<SignedKey<T>>;

  Leaders() {
    for (int j = 0; j < K; ++j) keys_[j] = splat(kNoKey<T>);
  }

  // Requires ascending indices: an entry that ties with a leader ranks after it.
  void insert(Keys key, int64_t index) { insert(key, splat(static_cast<SignedKey<T>>(index))); }

  void insert(Keys key, Keys place) {
    if constexpr (K > 2) {
      if (!lane_bits<T>(key > keys_[K - 1])) return;  // the usual case after some entries
    }
    for (int j = K - 1; j > 0; --j) {
      const auto from_above = key > keys_[j - 1], here = key > keys_[j];
      keys_[j] = from_above ? keys_[j - 1] : here ? key : keys_[j];
      places_[j] = from_above ? places_[j - 1] : here ? place : places_[j];
    }
    const auto here = key > keys_[0];
    keys_[0] = here ? key : keys_[0];
    places_[0] = here ? place : places_[0];
  }

  Keys key(int j) const { return keys_[j]; }
  Keys place(int j) const { return places_[j]; }

 private:
  Keys keys_[K], places_[K] = {};
};

}  // namespace vmoe::cpu::VMOE_ISA
