// sinkhorn/group -- the properties of one group that all domains of the iteration use.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../common/infinity.h"
#include "../../sinkhorn.h"
#include "../simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The larger of two numbers, or NaN if one of them is NaN.
double max_or_nan(double high, double value) {
  return !(value <= high) && !std::isnan(high) ? value : high;
}

// Tokens per piece. A sum over the tokens of a group is first computed within each piece, with one
// thread per piece, and then over the pieces. So its bits do not depend on the number of threads.
constexpr int64_t kPiece = 512;

// The fewest pieces per thread. These pieces together have 64k entries, which take microseconds.
int64_t grain(int64_t E) {
  return std::max<int64_t>(1, 65536 / (kPiece * std::max<int64_t>(1, E)));
}

// M = logits / epsilon of one group, their range, and the number of present tokens.
template <typename T>
struct Group {
  const T* logits;
  int64_t tokens;
  int64_t E;
  double inverse_epsilon;
  int64_t pieces;
  const Parallel& parallel;
  int64_t present = 0;                        // tokens that are not masked
  double log_marginal;                        // log(n / E)
  double high = -kInfinity, low = kInfinity;  // of the logits that are not -inf; NaN stays NaN
  bool complete = true;                       // only rows of masked tokens have -inf

  Group(const T* logits_, int64_t tokens_, int64_t E_, double epsilon, const Parallel& parallel_)
      : logits(logits_),
        tokens(tokens_),
        E(E_),
        inverse_epsilon(1 / epsilon),
        pieces((tokens + kPiece - 1) / kPiece),
        parallel(parallel_) {
    std::vector<Range> ranges(pieces);
    each_piece([&](int64_t piece, int64_t begin, int64_t end) {
      if (!scan_finite(begin, end, ranges[piece])) scan(begin, end, ranges[piece]);
    });
    for (const Range& range : ranges) {
      present += range.present;
      high = max_or_nan(high, range.high);
      low = std::min(low, range.low);
      complete = complete && range.complete;
    }
    log_marginal = std::log(marginal());
  }

  // Calls body(piece, begin, end) for all pieces, tokens [begin, end).
  template <typename Body>
  void each_piece(Body&& body) const {
    parallel(pieces, grain(E), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        body(i, i * kPiece, std::min((i + 1) * kPiece, tokens));
      }
    });
  }

  double marginal() const { return static_cast<double>(present) / static_cast<double>(E); }
  double M(int64_t t, int64_t e) const { return logits[t * E + e] * inverse_epsilon; }

  // Whether exp(M) and its products with the potentials fit type C. Let S = max M - min M. The
  // entries of exp(M) are divided by exp(max M), so they are in [exp(-S), 1]. v / max v is in
  // [exp(-S), 1] too, because the column sums for one u differ by no larger factor than the entries
  // of a row. The products of an entry and v / max v are in [exp(-2 S), 1]. u is in [1/E, exp(S)].
  // The smallest normal number is exp(-87) in float32 and exp(-708) in float64. A group in which a
  // present token has a logit of -inf does not fit. Such a group may have no plan, and then its
  // potentials grow with the iterations.
  template <typename C>
  bool fits_scaling() const {
    constexpr double spread = sizeof(C) == sizeof(float) ? 40 : 200;
    return complete && high > -kInfinity && (high - low) * inverse_epsilon <= spread;
  }

 private:
  struct Range {
    int64_t present = 0;
    double high = -kInfinity, low = kInfinity;
    bool complete = true;
  };

  // Computes the range of a piece and returns true if all its logits are finite. Otherwise returns
  // false and leaves `range` unchanged, because scan() starts from its initial values.
  bool scan_finite(int64_t begin, int64_t end, Range& range) const {
    const T* from = logits + begin * E;
    const int64_t size = (end - begin) * E;
    constexpr T inf = std::numeric_limits<T>::infinity();
    if (size == 0) return false;
    Vec<T> top = splat(-inf), bottom = splat(inf);
    // x - x is 0, or NaN if x is infinite or NaN. A NaN stays in the sum.
    Vec<T> poison{};
    const auto visit = [&](Vec<T> x) {
      top = x > top ? x : top;
      bottom = x < bottom ? x : bottom;
      poison += x - x;
    };
    int64_t i = 0;
    for (; i + kWidth<T> <= size; i += kWidth<T>) visit(load(from + i));
    if (i < size) visit(load_some(from + i, size - i, from[0]));
    if (sum<T>(poison) != 0) return false;
    T highest[kWidth<T>], lowest[kWidth<T>];
    store(highest, top);
    store(lowest, bottom);
    range.high = *std::max_element(highest, highest + kWidth<T>);
    range.low = *std::min_element(lowest, lowest + kWidth<T>);
    range.present = end - begin;
    return true;
  }

  void scan(int64_t begin, int64_t end, Range& range) const {
    for (int64_t t = begin; t < end; ++t) {
      int64_t reachable = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double x = logits[t * E + e];
        if (x == -kInfinity) continue;
        ++reachable;
        range.high = max_or_nan(range.high, x);
        range.low = std::min(range.low, x);
      }
      range.present += reachable > 0;
      range.complete = range.complete && (reachable == 0 || reachable == E);
    }
  }
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
