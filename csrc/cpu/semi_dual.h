// semi_dual -- what the solvers of ksparse_transport differentiate.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../ksparse_transport.h"
#include "keys.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

using Vector = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

// Of whole vectors.
double dot(const Vector& a, const Vector& b) {
  Vec<double> total{};
  for (size_t i = 0; i < a.size(); i += kWidth<double>) {
    total = fma(load(&a[i]), load(&b[i]), total);
  }
  return sum<double>(total);
}

// The semi-dual of one group, of which no token is absent. Columns are kept contiguous: every
// step reads each of them from top to bottom, and they are shared out among the threads.
template <typename T>
class SemiDual {
 public:
  static constexpr int64_t kPiece = 512;  // of tokens

  SemiDual(
      const T* similarity, int64_t tokens, int64_t E, int64_t k, double gamma,
      const Parallel& parallel)
      : parallel_(parallel),
        tokens_(tokens),
        size_((tokens + kLongest - 1) / kLongest * kLongest),
        stride_(size_ + kLongest),
        E_(E),
        k_(k),
        room_((std::min(k, size_) + kLongest) / kLongest * kLongest),
        columns_(new T[stride_ * E]),
        there_(size_, 0.0),
        alpha_before_(size_, 0.0),
        alpha_(size_),
        moved_(size_ / kPiece + 1),
        floor_(E, kUnknown),
        count_(E, 0),
        token_(new int32_t[room_ * E]),
        share_(new double[room_ * E]),
        scratch_(new Scratch[(E + grain() - 1) / grain()]) {
    const int64_t pieces = (size_ + kPiece - 1) / kPiece;
    std::vector<Seen> seen(pieces);
    parallel_(pieces, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        seen[i] = read(similarity, i * kPiece, std::min((i + 1) * kPiece, size_));
      }
    });
    for (const Seen& piece : seen) {
      bad_ = bad_ || piece.bad;
      largest_similarity_ = std::max(largest_similarity_, piece.largest);
    }
    std::fill_n(there_.begin(), tokens, 1.0);
    b_ = static_cast<double>(tokens) / static_cast<double>(E);
    scale_ = gamma * b_;
  }

  // Whether there is anything to solve: a token at least, and numbers only.
  bool solvable() const { return b_ > 0 && !bad_; }

  // The plan where it is not b p.
  T elsewhere() const { return bad_ ? std::numeric_limits<T>::quiet_NaN() : T{0}; }

  // Of every vector over tokens: as many and some without meaning, which stay 0.
  int64_t size() const { return size_; }

  // The gradient of the negated objective, to be minimised.
  void differentiate(const Vector& alpha, Vector& gradient) {
    differentiate(alpha, gradient, [](int64_t, int64_t) {});
  }

  // The same, and use(begin, end) for every piece of the tokens once its gradient is there: by the
  // thread that has it near.
  template <typename Use>
  void differentiate(const Vector& alpha, Vector& gradient, const Use& use) {
    project(alpha);
    each_range([&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) gradient[t] = -there_[t];
      each_share(begin, end, [&](int64_t t, int64_t, double p) { gradient[t] += b_ * p; });
      for (int64_t t = begin; t < end; t += kPiece) use(t, std::min(t + kPiece, end));
    });
  }

  // The negated objective, at the alpha just differentiated at.
  double value(const Vector& alpha) const {
    double sum = -dot(alpha, there_);
    each_share(0, size_, [&](int64_t t, int64_t e, double p) {
      const double u = alpha[t] + columns_[e * stride_ + t];
      sum += b_ * (u * p - scale_ / 2 * p * p);
    });
    return sum;
  }

  void write_plan(const Vector& alpha, T* plan) {
    if (solvable()) project(alpha);
    each_range([&](int64_t begin, int64_t end) {
      std::fill(plan + begin * E_, plan + std::min(end, tokens_) * E_, elsewhere());
      each_share(begin, end, [&](int64_t t, int64_t e, double p) {
        plan[t * E_ + e] = static_cast<T>(b_ * p);
      });
    });
  }

 private:
  static constexpr int64_t kLongest = std::max(kWidth<float>, kWidth<double>);
  static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  using Key = SignedKey<double>;

  struct Seen {
    bool bad = false;
    double largest = 0;
  };

  // Of a range of tokens, under its first piece: the deepest fall of alpha, and its largest size.
  struct Moved {
    double fall = 0, size = 0;
  };

  // Of one column: the candidates, and of them the first `kept`.
  struct Scratch {
    std::unique_ptr<int32_t[]> token;
    std::unique_ptr<double[]> value, share;
    std::unique_ptr<Key[]> key, left;
    int64_t kept;
    double tau;

    void make(int64_t size) {
      if (token) return;
      token.reset(new int32_t[size + kLongest]);
      value.reset(new double[size + kLongest]);
      share.reset(new double[size + kLongest]);
      key.reset(new Key[size + kLongest]);
      left.reset(new Key[size + kLongest]);
    }
  };

  // Columns of a range at least: some us of work, and few ranges that need scratch.
  int64_t grain() const { return std::max({int64_t{1}, 16384 / (size_ + 1), (E_ + 63) / 64}); }

  // Calls body(begin, end) for ranges of tokens, their number no matter of threads.
  template <typename Body>
  void each_range(const Body& body) const {
    parallel_(size_, 2 * kPiece, [&](int64_t begin, int64_t end) { body(begin, end); });
  }

  // Calls body(t, e, p) for the non-zeros of the projections, by e, then by t.
  template <typename Body>
  void each_share(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t e = 0; e < E_; ++e) {
      const int32_t *token = &token_[e * room_], *last = token + count_[e];
      const double* share = &share_[e * room_];
      const int32_t* at = std::lower_bound(token, last, static_cast<int32_t>(begin));
      for (; at != last && *at < end; ++at) body(*at, e, share[at - token]);
    }
  }

  // Tokens [begin, end) into the columns, -inf behind the last.
  Seen read(const T* similarity, int64_t begin, int64_t end) {
    constexpr int64_t W = kWidth<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    Seen seen;
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
        for (int64_t i = 0; i < width; ++i) store(&columns_[(e + i) * stride_ + t], square[i]);
      }
    }
    seen.bad = lane_bits<T>(bad) != 0;
    for (int64_t i = 0; i < W; ++i) {
      seen.largest = std::max(seen.largest, static_cast<double>(largest[i]));
    }
    return seen;
  }

  // What the columns share at one alpha: alpha in T for the filter, by how much the
  // filter's sums may be off, and by how much entries may have fallen since the last one.
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

  // The non-zeros of every column's P_k(u / (gamma b)), by t, where u = alpha + S[:, e].
  void project(const Vector& alpha) {
    if (k_ <= 0) return;
    move_to(alpha);
    parallel_(E_, grain(), [&](int64_t begin, int64_t end) {
      Scratch& scratch = scratch_[begin / grain()];
      scratch.make(size_);
      for (int64_t e = begin; e < end; ++e) project(alpha, e, scratch);
    });
  }

  // Only entries above a floor are looked at: those that were the k first of the step
  // before, and so k at least, have fallen no further than the deepest fall of alpha. The
  // floor needs no proof, as the result shows whether it was low enough: either the k-th
  // first entry lies on it or above, or the threshold does, below which an entry gets
  // nothing. If neither, everything is looked at.
  void project(const Vector& alpha, int64_t e, Scratch& scratch) {
    // u in T is off by its rounding and alpha's.
    const double slack = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) *
                         (largest_alpha_ + largest_similarity_);
    double before = floor_[e];
    if (std::isnan(before)) before = sampled_floor(e, scratch);
    T floor = static_cast<T>(before - largest_fall_ - 2 * slack);
    if (std::isnan(floor)) floor = -std::numeric_limits<T>::infinity();
    for (;;) {
      const int64_t count = collect(alpha, e, floor, scratch);
      const double bound = static_cast<double>(floor) + slack;
      const double kth = keep_first(count, scratch);
      const double level = threshold(scratch);
      floor_[e] = std::max(kth, level);
      if (floor == -std::numeric_limits<T>::infinity() || floor_[e] >= bound) break;
      floor = -std::numeric_limits<T>::infinity();
    }
    int32_t* token = &token_[e * room_];
    double* share = &share_[e * room_];
    int64_t count = 0;
    for (int64_t i = 0; i < scratch.kept; ++i) {
      const double p = scratch.share[i] - scratch.tau;
      token[count] = scratch.token[i];
      share[count] = p;
      count += p > 0;
    }
    count_[e] = count;
  }

  // A floor for the first step, at alpha = 0 or near: from every 16th entry, low enough
  // that k entries are hardly ever missed.
  double sampled_floor(int64_t e, Scratch& scratch) const {
    constexpr int64_t kStride = 16;
    const T* column = &columns_[e * stride_];
    double* value = scratch.value.get();
    int64_t sampled = 0;
    for (int64_t t = 0; t < tokens_; t += kStride) {
      value[sampled++] = static_cast<double>(alpha_[t]) + static_cast<double>(column[t]);
    }
    const double share = static_cast<double>(k_) / kStride;
    const int64_t rank = static_cast<int64_t>(share + 3 * std::sqrt(share) + 1);
    if (rank >= sampled) return -kInf;
    const Cut<Key> cut = find_first(sampled, rank + 1, scratch);
    double least = kInf;
    for (int64_t i = 0; i < sampled; ++i) {
      if (scratch.key[i] >= cut.key) least = std::min(least, value[i]);
    }
    return least;
  }

  // The entries that are not below the floor, by t, and their values in float64.
  int64_t collect(const Vector& alpha, int64_t e, T floor, Scratch& scratch) const {
    const T* column = &columns_[e * stride_];
    const Vec<T> low = splat(floor);
    int64_t count = 0;
    for (int64_t t = 0; t < size_; t += kWidth<T>) {
      const Mask<T> passes = ~(load(&alpha_[t]) + load(column + t) < low);  // NaN passes
#if !defined(__AVX512F__)
      // Without a compress instruction a branch is the lesser evil.
      if (lane_bits<T>(passes) == 0) continue;
#endif
      count += compress_index<T>(&scratch.token[count], passes, static_cast<int32_t>(t));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t t = scratch.token[i];
      scratch.value[i] = alpha[t] + column[t];
    }
    return count;
  }

  // Where to cut the n values for k of them; their keys stay behind.
  static Cut<Key> find_first(int64_t n, int64_t k, Scratch& scratch) {
    constexpr int64_t W = kWidth<double>;
    Key* keys = scratch.key.get();
    Vec<Key> low = splat(std::numeric_limits<Key>::max()), high = splat(kNoKey<double>);
    for (int64_t i = 0; i < n; i += W) {
      const Vec<double> value = load(&scratch.value[i]);
      Vec<Key> key = signed_key<double>(value);
      const Mask<Key> there = lane_index<Key>() < splat(static_cast<Key>(n - i));
      low = there ? min<Key>(low, key) : low;
      key = there ? key : splat(kNoKey<double>);
      high = max<Key>(high, key);
      store(keys + i, key);
    }
    Key least = low[0], most = high[0];
    for (int64_t i = 1; i < W; ++i) {
      least = std::min(least, low[i]);
      most = std::max(most, high[i]);
    }
    return find_cut(keys, n, k, least, most, scratch.left.get());
  }

  // Leaves the k first of the candidates (value descending, then t), by t; returns the
  // k-th value, -inf if there are not as many.
  double keep_first(int64_t count, Scratch& scratch) const {
    scratch.kept = count;
    if (count < k_) return -kInf;
    const Cut<Key> cut = find_first(count, k_, scratch);
    int64_t ties = cut.ties;
    int32_t* token = scratch.token.get();
    double* value = scratch.value.get();
    Key* key = scratch.key.get();
    const auto keep = [&](auto&& stays) {
      int64_t kept = 0;
      for (int64_t i = 0; i < scratch.kept; ++i) {
        token[kept] = token[i];
        value[kept] = value[i];
        key[kept] = key[i];
        kept += stays(key[i]);
      }
      scratch.kept = kept;
    };
    keep([&](Key k) { return k >= cut.key; });
    if (scratch.kept > k_) keep([&](Key k) { return k > cut.key || ties-- > 0; });
    return *std::min_element(value, value + scratch.kept);
  }

  // The threshold of the simplex for what was kept, tau, relative to the largest and over
  // scale_; returns where it lies among the values. Entries at or below
  // the threshold are taken out until there are none: mostly all stay at once, and no order is
  // needed.
  double threshold(Scratch& scratch) const {
    scratch.tau = kUnknown;
    if (scratch.kept == 0) return -kInf;
    constexpr int64_t W = kWidth<double>;
    double *value = scratch.value.get(), *share = scratch.share.get();
    const int64_t end = (scratch.kept + W - 1) / W * W;
    std::fill(value + scratch.kept, value + end, -kInf);
    Vec<double> top = splat(-kInf);
    for (int64_t i = 0; i < end; i += W) top = max<double>(load(value + i), top);
    double largest = top[0];
    for (int64_t i = 1; i < W; ++i) largest = std::max(largest, top[i]);
    for (int64_t i = 0; i < end; i += W) store(share + i, (load(value + i) - largest) / scale_);
    double low = -kInf;
    for (int64_t support = 0;;) {
      Vec<double> total{};
      Mask<double> above{};
      for (int64_t i = 0; i < end; i += W) {
        const Vec<double> u = load(share + i);
        const Mask<double> in = u > low;
        total += in ? u : Vec<double>{};
        above -= in;  // true is -1
      }
      int64_t count = 0;
      for (int64_t i = 0; i < W; ++i) count += above[i];
      if (count == support || count == 0) break;
      support = count;
      low = scratch.tau = (sum<double>(total) - 1) / static_cast<double>(count);
    }
    return largest + scale_ * scratch.tau;
  }

  const Parallel& parallel_;
  int64_t tokens_, size_, stride_, E_, k_;
  int64_t room_;  // of a column's non-zeros
  double b_ = 0, scale_ = 0;
  bool bad_ = false;
  std::unique_ptr<T[]> columns_;  // [E, stride]; a power of two would share cache sets
  Vector there_;                  // 1 for a token, 0 behind the last
  double largest_similarity_ = 0;

  // Of move_to.
  Vector alpha_before_;
  std::vector<T> alpha_;
  std::vector<Moved> moved_;
  double largest_fall_ = 0, largest_alpha_ = 0;

  Vector floor_;  // [E] of the step before, or NaN

  // The non-zeros of the projections.
  std::vector<int64_t> count_;        // [E]
  std::unique_ptr<int32_t[]> token_;  // [E, room]
  std::unique_ptr<double[]> share_;   // [E, room]

  std::unique_ptr<Scratch[]> scratch_;  // by range of columns
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
