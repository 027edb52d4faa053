// ksparse_transport/semi_dual -- the objective that the solvers of ksparse_transport maximise.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "columns.h"
#include "projection.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

using Vector = std::vector<double>;

// The dot product of two vectors. Their length is a multiple of the vector width.
double dot(const Vector& a, const Vector& b) {
  Vec<double> total{};
  for (size_t i = 0; i < a.size(); i += kWidth<double>) {
    total = fma(load(&a[i]), load(&b[i]), total);
  }
  return sum<double>(total);
}

// The semi-dual of one group without masked tokens.
template <typename T>
class SemiDual {
 public:
  static constexpr int64_t kPiece = Columns<T>::kPiece;

  SemiDual(
      const T* similarity, int64_t tokens, int64_t E, int64_t k, double gamma,
      const Parallel& parallel)
      : parallel_(parallel),
        columns_(similarity, tokens, E, parallel),
        k_(k),
        room_((std::min(k, size()) + kLongest) / kLongest * kLongest),
        b_(static_cast<double>(tokens) / static_cast<double>(E)),
        scale_(gamma * b_),
        present_(size(), 0.0),
        alpha_before_(size(), 0.0),
        alpha_(size()),
        moved_(size() / kPiece + 1),
        floor_(E, kUndefined),
        count_(E, 0),
        token_(room_ * E),
        share_(room_ * E),
        projections_((E + grain() - 1) / grain()) {
    std::fill_n(present_.begin(), tokens, 1.0);
  }

  // Whether there is a problem to solve: at least one token, and no NaN or +inf.
  bool solvable() const { return b_ > 0 && !columns_.bad(); }

  // The value of plan entries outside the support.
  T elsewhere() const { return columns_.bad() ? std::numeric_limits<T>::quiet_NaN() : T{0}; }

  // The length of every vector over tokens. Entries after the last token stay 0.
  int64_t size() const { return columns_.size(); }

  // The gradient of the negated objective, which the solvers minimise.
  void differentiate(const Vector& alpha, Vector& gradient) {
    differentiate(alpha, gradient, [](int64_t, int64_t) {});
  }

  // Computes the same gradient, and calls use(begin, end) for every piece of the tokens as soon as
  // the gradient of the piece is computed. The call is on the thread that has this gradient in its
  // cache.
  template <typename Use>
  void differentiate(const Vector& alpha, Vector& gradient, const Use& use) {
    project(alpha);
    each_range([&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) gradient[t] = -present_[t];
      each_share(begin, end, [&](int64_t t, int64_t, double p) { gradient[t] += b_ * p; });
      for (int64_t t = begin; t < end; t += kPiece) use(t, std::min(t + kPiece, end));
    });
  }

  // The negated objective at `alpha`. The last call of differentiate() must have had the same
  // alpha.
  double value(const Vector& alpha) const {
    double sum = -dot(alpha, present_);
    each_share(0, size(), [&](int64_t t, int64_t e, double p) {
      const double u = alpha[t] + columns_[e][t];
      sum += b_ * (u * p - scale_ / 2 * p * p);
    });
    return sum;
  }

  void write_plan(const Vector& alpha, T* plan) {
    if (solvable()) project(alpha);
    each_range([&](int64_t begin, int64_t end) {
      std::fill(plan + begin * E(), plan + std::min(end, columns_.tokens()) * E(), elsewhere());
      each_share(begin, end, [&](int64_t t, int64_t e, double p) {
        plan[t * E() + e] = static_cast<T>(b_ * p);
      });
    });
  }

 private:
  static constexpr int64_t kLongest = Columns<T>::kLongest;

  // The largest decrease of an entry of alpha, and the largest absolute value of an entry, over one
  // range of tokens. A Moved is stored at the index of the first piece of its range.
  struct Moved {
    double fall = 0, size = 0;
  };

  int64_t E() const { return columns_.E(); }

  // The smallest number of columns per range. A range has some microseconds of work. There are at
  // most 64 ranges, because each range needs scratch memory.
  int64_t grain() const { return std::max({int64_t{1}, 16384 / (size() + 1), (E() + 63) / 64}); }

  // Calls body(begin, end) for ranges of tokens. Results must not depend on the number of ranges.
  template <typename Body>
  void each_range(const Body& body) const {
    parallel_(size(), 2 * kPiece, [&](int64_t begin, int64_t end) { body(begin, end); });
  }

  // Calls body(t, e, p) for the non-zeros of the projections in tokens [begin, end), by e, then by
  // t.
  template <typename Body>
  void each_share(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t e = 0; e < E(); ++e) {
      const int32_t *token = &token_[e * room_], *last = token + count_[e];
      const double* share = &share_[e * room_];
      const int32_t* at = std::lower_bound(token, last, static_cast<int32_t>(begin));
      for (; at != last && *at < end; ++at) body(*at, e, share[at - token]);
    }
  }

  // Computes the values of alpha that all columns use: alpha in type T for collect(), the largest
  // absolute value of an entry, and the largest decrease of an entry since the last alpha.
  void move_to(const Vector& alpha) {
    std::fill(moved_.begin(), moved_.end(), Moved{});
    each_range([&](int64_t begin, int64_t end) {
      Vec<double> fall{}, size{};
      for (int64_t t = begin; t < end; t += kWidth<double>) {
        const Vec<double> a = load(&alpha[t]);
        const Vec<double> by = load(&alpha_before_[t]) - a;
        fall = by > fall ? by : fall;
        const Vec<double> absolute = a < 0.0 ? -a : a;
        size = absolute > size ? absolute : size;
        store(&alpha_before_[t], a);
      }
      for (int64_t t = begin; t < end; ++t) alpha_[t] = static_cast<T>(alpha[t]);
      Moved& moved = moved_[begin / kPiece];
      for (int64_t i = 0; i < kWidth<double>; ++i) {
        moved.fall = std::max(moved.fall, fall[i]);
        moved.size = std::max(moved.size, size[i]);
      }
    });
    largest_fall_ = largest_alpha_ = 0;
    for (const Moved& moved : moved_) {
      largest_fall_ = std::max(largest_fall_, moved.fall);
      largest_alpha_ = std::max(largest_alpha_, moved.size);
    }
  }

  // Computes the non-zeros of P_k(u / (gamma b)) of every column, in order of t, where u = alpha +
  // S[:, e].
  void project(const Vector& alpha) {
    if (k_ <= 0) return;
    move_to(alpha);
    parallel_(E(), grain(), [&](int64_t begin, int64_t end) {
      Projection& projection = projections_[begin / grain()];
      projection.make(size());
      for (int64_t e = begin; e < end; ++e) project(alpha, e, projection);
    });
  }

  // Only entries at or above a floor are candidates. Since the last step, no entry has decreased by
  // more than the largest decrease of alpha. So at least k entries are at or above the last floor
  // minus that decrease. The new floor is low enough if the k-th entry, or the threshold of the
  // shares, is not below the new floor. Otherwise a second pass takes all entries as candidates.
  void project(const Vector& alpha, int64_t e, Projection& projection) {
    // A bound on the error of u in type T, from the rounding of u and the rounding of alpha.
    const double slack = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) *
                         (largest_alpha_ + columns_.largest());
    double before = floor_[e];
    if (std::isnan(before)) before = sampled_floor(e, projection);
    T floor = static_cast<T>(before - largest_fall_ - 2 * slack);
    if (std::isnan(floor)) floor = -std::numeric_limits<T>::infinity();
    for (;;) {
      const int64_t count = collect(alpha, e, floor, projection);
      const double bound = static_cast<double>(floor) + slack;
      const double kth = projection.keep_first(count, k_);
      const double level = projection.threshold(scale_);
      floor_[e] = std::max(kth, level);
      if (floor == -std::numeric_limits<T>::infinity() || floor_[e] >= bound) break;
      floor = -std::numeric_limits<T>::infinity();
    }
    int32_t* token = &token_[e * room_];
    double* share = &share_[e * room_];
    int64_t count = 0;
    for (int64_t i = 0; i < projection.kept(); ++i) {
      const double p = projection.kept_share(i);
      token[count] = projection.kept_token(i);
      share[count] = p;
      count += p > 0;
    }
    count_[e] = count;
  }

  // A floor for the first step, where alpha is 0 or near 0. The floor is estimated from every 16th
  // entry. The estimate is low, so fewer than k entries reach the floor only rarely.
  double sampled_floor(int64_t e, Projection& projection) const {
    constexpr int64_t kStride = 16;
    const T* column = columns_[e];
    double* value = projection.value();
    int64_t sampled = 0;
    for (int64_t t = 0; t < columns_.tokens(); t += kStride) {
      value[sampled++] = static_cast<double>(alpha_[t]) + static_cast<double>(column[t]);
    }
    const double share = static_cast<double>(k_) / kStride;
    const int64_t rank = static_cast<int64_t>(share + 3 * std::sqrt(share) + 1);
    if (rank >= sampled) return -kInfinity;
    const Cut<Projection::Key> cut = projection.find_first(sampled, rank + 1);
    double least = kInfinity;
    for (int64_t i = 0; i < sampled; ++i) {
      if (projection.key(i) >= cut.key) least = std::min(least, value[i]);
    }
    return least;
  }

  // Collects the entries at or above the floor, by t, with their values in float64.
  int64_t collect(const Vector& alpha, int64_t e, T floor, Projection& projection) const {
    const T* column = columns_[e];
    int32_t* token = projection.token();
    double* value = projection.value();
    const Vec<T> low = splat(floor);
    int64_t count = 0;
    for (int64_t t = 0; t < size(); t += kWidth<T>) {
      const Mask<T> passes = ~(load(&alpha_[t]) + load(column + t) < low);  // NaN passes
#if !defined(__AVX512F__)
      // Without a compress instruction, a branch is cheaper.
      if (lane_bits<T>(passes) == 0) continue;
#endif
      count += compress_index<T>(token + count, passes, static_cast<int32_t>(t));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t t = token[i];
      value[i] = alpha[t] + column[t];
    }
    return count;
  }

  const Parallel& parallel_;
  Columns<T> columns_;
  int64_t k_;
  int64_t room_;  // the most non-zeros of a column
  double b_, scale_;
  Vector present_;  // 1 for a token, 0 after the last token

  // Scratch memory of move_to.
  Vector alpha_before_;
  std::vector<T> alpha_;
  std::vector<Moved> moved_;
  double largest_fall_ = 0, largest_alpha_ = 0;

  Vector floor_;  // [E]  of the last step, NaN before the first

  // The non-zeros of the projections.
  std::vector<int64_t> count_;  // [E]
  Buffer<int32_t> token_;       // [E, room]
  Buffer<double> share_;        // [E, room]

  std::vector<Projection> projections_;  // one per range of columns
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
