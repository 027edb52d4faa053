// softmax -- the parts that all CPU softmaxes share, and the softmax over short rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {

// softmax_shift: the value that is subtracted before exp. The value is the maximum of the row, or 0
// if the whole row is -inf. With 0, exp gives 0 for -inf, not NaN.
//
// softmax_scale: the factor of the exponentials. The factor is 1 over their sum, or 0 if the whole
// row is -inf. Other sums are at least 1.
//
// The maximum may ignore a NaN. The sum does not, so the whole row becomes NaN.
template <typename T>
Vec<T> softmax_shift(Vec<T> high) {
  return high == splat(-std::numeric_limits<T>::infinity()) ? Vec<T>{} : high;
}
template <typename T>
Vec<T> softmax_scale(Vec<T> total) {
  return total == Vec<T>{} ? Vec<T>{} : T{1} / total;
}

// The softmaxes of contiguous rows of E entries, `width` rows at a time, one row per lane. Sums and
// maxima run over the entries in order, so equal rows get equal bits in every lane.
template <typename T>
class RowSoftmax {
 public:
  static constexpr int64_t W = kWidth<T>;

  explicit RowSoftmax(int64_t E) : E_(E), entries_(E * W) {}

  // Reads rows [count, E], 1 <= count <= width, and nothing at or past `end`.
  void read(const T* rows, int64_t count, const T* end) {
    const T* row[W];
    // Lanes without a row repeat the last row.
    for (int64_t r = 0; r < W; ++r) row[r] = rows + std::min(r, count - 1) * E_;
    Vec<T> high = splat(-std::numeric_limits<T>::infinity());
    for (int64_t e = 0; e < E_; e += W) {
      Vec<T> block[W];
      if (end - row[W - 1] - e >= W) {
        for (int64_t r = 0; r < W; ++r) block[r] = load(row[r] + e);
      } else {
        for (int64_t r = 0; r < W; ++r) block[r] = load_within(row[r] + e, end);
      }
      transpose<T>(block);
      for (int64_t j = 0; j < std::min(W, E_ - e); ++j) {
        high = max<T>(block[j], high);
        store(entry(e + j), block[j]);
      }
    }
    high_ = softmax_shift<T>(high);
    Vec<T> total{};
    for (int64_t e = 0; e < E_; ++e) {
      const Vec<T> power = exp_negative(load(entry(e)) - high_);
      store(entry(e), power);
      total += power;
    }
    total_ = total;
    scale_ = softmax_scale<T>(total_);
  }

  int64_t size() const { return E_; }
  Vec<T> gate(int64_t e) const { return load(entry(e)) * scale_; }
  Vec<T> high() const { return high_; }
  Vec<T> scale() const { return scale_; }
  Mask<T> absent() const { return total_ == Vec<T>{}; }   // rows of -inf
  Mask<T> undefined() const { return total_ != total_; }  // rows of NaN

 private:
  T* entry(int64_t e) { return entries_.get() + e * W; }
  const T* entry(int64_t e) const { return entries_.get() + e * W; }

  int64_t E_;
  Buffer<T> entries_;  // [E, width]
  Vec<T> high_, total_, scale_;
};

}  // namespace vmoe::cpu::VMOE_ISA
