#include "../ksparse_transport.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <vector>

#include "../order.h"
#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

using Vector = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

// In order, one by one: a zero more or less, of an absent token, then changes no bit.
double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The semi-dual of one group. Columns are kept contiguous: every step reads each
// of them from top to bottom.
template <typename T>
class SemiDual {
 public:
  SemiDual(const T* similarity, int64_t tokens, int64_t E, int64_t k, double gamma)
      : tokens_(tokens),
        size_((tokens + kLongest - 1) / kLongest * kLongest),
        E_(E),
        k_(k),
        columns_(size_ * E, -std::numeric_limits<T>::infinity()),
        there_(size_, 0.0),
        alpha_before_(size_, 0.0),
        alpha_(size_),
        floor_(E, kUnknown),
        candidate_(size_ + kWidth<T>),
        value_(size_),
        key_(size_),
        share_(size_) {
    for (int64_t t = 0; t < tokens; ++t) {
      bool there = false;
      for (int64_t e = 0; e < E; ++e) {
        const T s = similarity[t * E + e];
        columns_[e * size_ + t] = s;
        if (std::isnan(s) || s == kInf) bad_ = true;
        if (s == -kInf) continue;
        there = true;
        largest_similarity_ = std::max(largest_similarity_, std::abs(static_cast<double>(s)));
      }
      there_[t] = there;
    }
    b_ = dot(there_, there_) / static_cast<double>(E);
    scale_ = gamma * b_;
  }

  // Whether there is anything to solve: a token at least, and numbers only.
  bool solvable() const { return b_ > 0 && !bad_; }

  // Of every vector over tokens: as many and some without meaning, which stay 0.
  int64_t size() const { return size_; }

  // The negated objective, to be minimised, and its gradient.
  double evaluate(const Vector& alpha, Vector& gradient) {
    move_to(alpha);
    double value = -dot(alpha, there_);
    for (int64_t t = 0; t < size_; ++t) gradient[t] = -there_[t];
    for (int64_t e = 0; e < E_; ++e) {
      project(alpha, e, [&](int64_t t, double u, double p) {
        value += b_ * (u * p - scale_ / 2 * p * p);
        gradient[t] += b_ * p;
      });
    }
    return value;
  }

  void write_plan(const Vector& alpha, T* plan) {
    std::fill(plan, plan + tokens_ * E_, bad_ ? std::numeric_limits<T>::quiet_NaN() : T{0});
    if (!solvable()) return;
    move_to(alpha);
    for (int64_t e = 0; e < E_; ++e) {
      project(alpha, e, [&](int64_t t, double, double p) {
        plan[t * E_ + e] = static_cast<T>(b_ * p);
      });
    }
  }

 private:
  static constexpr int64_t kLongest = std::max(kWidth<float>, kWidth<double>);
  static constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

  // What the columns share at one alpha: alpha in T for the filter, by how much the
  // filter's sums may be off, and by how much entries may have fallen since the last one.
  void move_to(const Vector& alpha) {
    Vec<double> fall{}, size{};
    for (int64_t t = 0; t < size_; t += kWidth<double>) {
      const Vec<double> a = load(&alpha[t]);
      const Vec<double> by = load(&alpha_before_[t]) - a;
      fall = by > fall ? by : fall;
      const Vec<double> absolute = a < 0.0 ? -a : a;
      size = absolute > size ? absolute : size;
      store(&alpha_before_[t], a);
    }
    for (int64_t t = 0; t < size_; ++t) alpha_[t] = static_cast<T>(alpha[t]);
    largest_fall_ = largest_alpha_ = 0;
    for (int64_t i = 0; i < kWidth<double>; ++i) {
      largest_fall_ = std::max(largest_fall_, fall[i]);
      largest_alpha_ = std::max(largest_alpha_, size[i]);
    }
  }

  // Calls emit(t, u, p) for the non-zeros of column e's P_k(u / (gamma b)), by t, where
  // u = alpha + S[:, e].
  //
  // Only entries above a floor are looked at: those that were the k first of the step
  // before, and so k at least, have fallen no further than the deepest fall of alpha. The
  // floor needs no proof, as the result shows whether it was low enough: either the k-th
  // first entry lies on it or above, or the threshold does, below which an entry gets
  // nothing. If neither, everything is looked at.
  template <typename Emit>
  void project(const Vector& alpha, int64_t e, Emit&& emit) {
    if (k_ <= 0) return;
    // u in T is off by its rounding and alpha's.
    const double slack = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) *
                         (largest_alpha_ + largest_similarity_);
    double before = floor_[e];
    if (std::isnan(before)) before = sampled_floor(e);
    T floor = static_cast<T>(before - largest_fall_ - 2 * slack);
    if (std::isnan(floor)) floor = -std::numeric_limits<T>::infinity();
    for (;;) {
      const int64_t count = collect(alpha, e, floor);
      const double bound = static_cast<double>(floor) + slack;
      const double kth = keep_first(count);
      const double level = threshold();
      floor_[e] = std::max(kth, level);
      if (floor == -std::numeric_limits<T>::infinity() || floor_[e] >= bound) break;
      floor = -std::numeric_limits<T>::infinity();
    }
    for (int64_t i = 0; i < kept_; ++i) {
      const double p = share_[i] - tau_;
      if (p > 0) emit(candidate_[i], value_[i], p);
    }
  }

  // A floor for the first step, at alpha = 0 or near: from every 16th entry, low enough
  // that k entries are hardly ever missed.
  double sampled_floor(int64_t e) {
    constexpr int64_t kStride = 16;
    const T* column = columns_.data() + e * size_;
    int64_t sampled = 0;
    for (int64_t t = 0; t < tokens_; t += kStride) {
      value_[sampled++] = static_cast<double>(alpha_[t]) + static_cast<double>(column[t]);
    }
    const double share = static_cast<double>(k_) / kStride;
    const int64_t rank = static_cast<int64_t>(share + 3 * std::sqrt(share) + 1);
    if (rank >= sampled) return -kInf;
    std::nth_element(
        value_.begin(), value_.begin() + rank, value_.begin() + sampled, std::greater<>());
    return value_[rank];
  }

  // The entries that are not below the floor: candidate_, by t, and their value_.
  int64_t collect(const Vector& alpha, int64_t e, T floor) {
    const T* column = columns_.data() + e * size_;
    const Vec<T> low = splat(floor);
    int64_t count = 0;
    for (int64_t t = 0; t < size_; t += kWidth<T>) {
      const Mask<T> passes = ~(load(&alpha_[t]) + load(column + t) < low);  // NaN passes
      if (lane_bits<T>(passes) == 0) continue;
      count += compress_index<T>(&candidate_[count], passes, static_cast<int32_t>(t));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t t = candidate_[i];
      value_[i] = alpha[t] + column[t];
    }
    return count;
  }

  // Leaves the k first of the candidates (value descending, then t), by t; returns the
  // k-th value, -inf if there are not as many.
  double keep_first(int64_t count) {
    kept_ = std::min(count, k_);
    if (count < k_) return -kInf;
    for (int64_t i = 0; i < count; ++i) key_[i] = order_key(value_[i]);
    const auto last = key_.begin() + (k_ - 1);
    std::nth_element(key_.begin(), last, key_.begin() + count, std::greater<>());
    const uint64_t least = *last;
    int64_t ties = 1;
    for (auto key = key_.begin(); key != last; ++key) ties += *key == least;
    double kth = 0;
    kept_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t key = order_key(value_[i]);
      if (key < least || (key == least && ties-- <= 0)) continue;
      if (key == least) kth = value_[i];
      candidate_[kept_] = candidate_[i];
      value_[kept_++] = value_[i];
    }
    return kth;
  }

  // tau_, the threshold of the simplex for what was kept, relative to the largest and over
  // scale_ as in simplex.h; returns where it lies among the values. Entries at or below
  // the threshold are taken out until there are none: mostly all stay at once, and no order is
  // needed. Lanes are places among the kept, not among the tokens: an absent token changes
  // nothing.
  double threshold() {
    tau_ = kUnknown;
    if (kept_ == 0) return -kInf;
    constexpr int64_t W = kWidth<double>;
    const int64_t end = (kept_ + W - 1) / W * W;
    std::fill(value_.begin() + kept_, value_.begin() + end, -kInf);
    Vec<double> top = splat(-kInf);
    for (int64_t i = 0; i < end; i += W) top = max<double>(load(&value_[i]), top);
    double largest = top[0];
    for (int64_t i = 1; i < W; ++i) largest = std::max(largest, top[i]);
    for (int64_t i = 0; i < end; i += W) store(&share_[i], (load(&value_[i]) - largest) / scale_);
    double low = -kInf;
    for (int64_t support = 0;;) {
      Vec<double> total{};
      Mask<double> above{};
      for (int64_t i = 0; i < end; i += W) {
        const Vec<double> u = load(&share_[i]);
        const Mask<double> in = u > low;
        total += in ? u : Vec<double>{};
        above -= in;  // true is -1
      }
      int64_t count = 0;
      for (int64_t i = 0; i < W; ++i) count += above[i];
      if (count == support || count == 0) break;
      support = count;
      low = tau_ = (sum<double>(total) - 1) / static_cast<double>(count);
    }
    return largest + scale_ * tau_;
  }

  int64_t tokens_, size_, E_, k_;
  double b_ = 0, scale_ = 0;
  bool bad_ = false;
  std::vector<T> columns_;  // [E, size]
  Vector there_;
  double largest_similarity_ = 0;

  // Of move_to.
  Vector alpha_before_;
  std::vector<T> alpha_;
  double largest_fall_ = 0, largest_alpha_ = 0;

  Vector floor_;  // [E] of the step before, or NaN

  // Of one column: the candidates, and of them the first kept_.
  std::vector<int32_t> candidate_;
  Vector value_;
  std::vector<uint64_t> key_;
  Vector share_;  // (value - largest) / scale
  int64_t kept_ = 0;
  double tau_ = 0;
};

// Betas 0.9 and 0.999; the moments are divided by what they fall short at the start.
void adam_step(
    int64_t size, double rate, double mean_share, double square_share, const double* gradient,
    double* mean, double* square, double* alpha) {
  for (int64_t t = 0; t < size; t += kWidth<double>) {
    const Vec<double> g = load(gradient + t);
    const Vec<double> m = 0.9 * load(mean + t) + 0.1 * g;
    const Vec<double> s = 0.999 * load(square + t) + 0.001 * g * g;
    const Vec<double> step = rate * (m / mean_share) / (sqrt(s / square_share) + 1e-8);
    store(mean + t, m);
    store(square + t, s);
    store(alpha + t, load(alpha + t) - step);
  }
}

template <typename T>
void adam(SemiDual<T>& dual, Vector& alpha, const TransportOptions& options) {
  Vector gradient(alpha.size()), mean(alpha.size(), 0), square(alpha.size(), 0);
  double decay1 = 1, decay2 = 1;
  for (int64_t i = 0; i < options.iterations; ++i) {
    dual.evaluate(alpha, gradient);
    decay1 *= 0.9;
    decay2 *= 0.999;
    adam_step(
        static_cast<int64_t>(alpha.size()), options.learning_rate, 1 - decay1, 1 - decay2,
        gradient.data(), mean.data(), square.data(), alpha.data());
    if (std::sqrt(dot(gradient, gradient)) <= options.tolerance) return;
  }
}

template <typename T>
void lbfgs(SemiDual<T>& dual, Vector& alpha, const TransportOptions& options) {
  constexpr size_t kMemory = 10;
  constexpr int kHalvings = 40;
  struct Pair {
    Vector step, change;
    double curvature, weight;
  };
  std::deque<Pair> memory;
  const size_t n = alpha.size();
  Vector gradient(n), direction(n), next(n), next_gradient(n);
  double value = dual.evaluate(alpha, gradient);
  for (int64_t i = 0; i < options.iterations; ++i) {
    if (!(std::sqrt(dot(gradient, gradient)) > options.tolerance)) return;
    direction = gradient;
    for (auto pair = memory.rbegin(); pair != memory.rend(); ++pair) {
      pair->weight = dot(pair->step, direction) / pair->curvature;
      for (size_t t = 0; t < n; ++t) direction[t] -= pair->weight * pair->change[t];
    }
    if (!memory.empty()) {
      const Pair& newest = memory.back();
      const double scale = newest.curvature / dot(newest.change, newest.change);
      for (double& d : direction) d *= scale;
    }
    for (auto& pair : memory) {
      const double weight = pair.weight - dot(pair.change, direction) / pair.curvature;
      for (size_t t = 0; t < n; ++t) direction[t] += weight * pair.step[t];
    }
    const double slope = -dot(direction, gradient);
    // Without memory the gradient's scale says nothing about the step's: about 1 is
    // the size of a gradient entry at the start, and of a similarity.
    double rate = 1;
    int halvings = 0;
    for (; halvings < kHalvings; ++halvings, rate /= 2) {
      for (size_t t = 0; t < n; ++t) next[t] = alpha[t] - rate * direction[t];
      const double next_value = dual.evaluate(next, next_gradient);
      if (next_value <= value + 1e-4 * rate * slope) {
        value = next_value;
        break;
      }
    }
    if (halvings == kHalvings) {
      // At a kink the curvature pairs mislead: try steepest descent once, then stop.
      if (memory.empty()) return;
      memory.clear();
      continue;
    }
    Pair pair{Vector(n), Vector(n), 0, 0};
    for (size_t t = 0; t < n; ++t) {
      pair.step[t] = next[t] - alpha[t];
      pair.change[t] = next_gradient[t] - gradient[t];
    }
    pair.curvature = dot(pair.step, pair.change);
    if (pair.curvature > 1e-12 * dot(pair.change, pair.change)) {
      memory.push_back(std::move(pair));
      if (memory.size() > kMemory) memory.pop_front();
    }
    std::swap(alpha, next);
    std::swap(gradient, next_gradient);
  }
}

}  // namespace

template <typename T>
void ksparse_transport(
    const T* similarity, T* plan, int64_t tokens, int64_t E, const TransportOptions& options,
    int64_t group_begin, int64_t group_end) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    SemiDual<T> dual(similarity + g * tokens * E, tokens, E, options.k, options.gamma);
    Vector alpha(dual.size(), 0);
    if (dual.solvable()) {
      (options.solver == Solver::kAdam ? adam<T> : lbfgs<T>)(dual, alpha, options);
    }
    dual.write_plan(alpha, plan + g * tokens * E);
  }
}

template void ksparse_transport(
    const float*, float*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t);
template void ksparse_transport(
    const double*, double*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
