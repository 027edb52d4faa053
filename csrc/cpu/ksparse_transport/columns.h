// ksparse_transport/columns -- the similarities of one group, stored by expert.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../../common/parallel.h"
#include "../buffer.h"
#include "../simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Similarities [T, E] stored by expert as [E, stride], because every step of a solver reads each
// column from its first token to its last. Entries after the last token are -inf.
template <typename T>
class Columns {
 public:
  static constexpr int64_t kPiece = 512;  // tokens
  static constexpr int64_t kLongest = std::max(kWidth<float>, kWidth<double>);

  Columns(const T* similarity, int64_t tokens, int64_t E, const Parallel& parallel)
      : tokens_(tokens),
        E_(E),
        size_((tokens + kLongest - 1) / kLongest * kLongest),
        stride_(size_ + kLongest),
        entries_(stride_ * E) {
    const int64_t pieces = (size_ + kPiece - 1) / kPiece;
    std::vector<Range> ranges(pieces);
    parallel(pieces, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        ranges[i] = read(similarity, i * kPiece, std::min((i + 1) * kPiece, size_));
      }
    });
    for (const Range& range : ranges) {
      bad_ = bad_ || range.bad;
      largest_ = std::max(largest_, range.largest);
    }
  }

  int64_t tokens() const { return tokens_; }
  int64_t E() const { return E_; }
  // Tokens rounded up to whole vectors.
  int64_t size() const { return size_; }
  const T* operator[](int64_t e) const { return &entries_[e * stride_]; }

  // Whether any entry is NaN or +inf.
  bool bad() const { return bad_; }
  // The largest absolute value of the finite entries.
  double largest() const { return largest_; }

 private:
  struct Range {
    bool bad = false;
    double largest = 0;
  };

  // Transposes tokens [begin, end) into the columns.
  Range read(const T* similarity, int64_t begin, int64_t end) {
    constexpr int64_t W = kWidth<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    Mask<T> bad{};
    Vec<T> largest{};
    for (int64_t t = begin; t < end; t += W) {
      for (int64_t e = 0; e < E_; e += W) {
        const int64_t width = std::min(W, E_ - e);
        Vec<T> square[W];
        for (int64_t i = 0; i < W; ++i) {
          const T* from = similarity + (t + i) * E_ + e;
          square[i] = t + i >= tokens_ ? splat(-inf)
                      : width == W     ? load(from)
                                       : load_some(from, width, -inf);
          const Vec<T> size = square[i] < 0 ? -square[i] : square[i];
          bad |= ~(square[i] < inf);
          largest = size < inf && size > largest ? size : largest;
        }
        transpose<T>(square);
        for (int64_t i = 0; i < width; ++i) store(&entries_[(e + i) * stride_ + t], square[i]);
      }
    }
    Range range;
    range.bad = lane_bits<T>(bad) != 0;
    for (int64_t i = 0; i < W; ++i) {
      range.largest = std::max(range.largest, static_cast<double>(largest[i]));
    }
    return range;
  }

  int64_t tokens_, E_, size_, stride_;
  // [E, stride]. If the stride were a power of two, columns would share cache sets.
  Buffer<T> entries_;
  bool bad_ = false;
  double largest_ = 0;
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
