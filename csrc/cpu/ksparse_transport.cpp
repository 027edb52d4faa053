#include "../ksparse_transport.h"

#include <cmath>
#include <deque>
#include <limits>

#include "simplex.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

using Vector = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The semi-dual of one group. Columns are kept contiguous: every step reads each
// of them from top to bottom.
class SemiDual {
 public:
  template <typename T>
  SemiDual(const T* similarity, int64_t tokens, int64_t E, int64_t k, double gamma)
      : tokens_(tokens), E_(E), k_(k), columns_(tokens * E), u_(tokens), there_(tokens, 0.0) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        const double s = similarity[t * E + e];
        columns_[e * tokens + t] = s;
        if (s != -kInf) there_[t] = 1;
        if (std::isnan(s) || s == kInf) bad_ = true;
      }
    }
    b_ = dot(there_, there_) / static_cast<double>(E);
    scale_ = gamma * b_;
  }

  // Whether there is anything to solve: a token at least, and numbers only.
  bool solvable() const { return b_ > 0 && !bad_; }

  // Calls emit(t, p) for the non-zeros of column e's P_k((alpha + S[:, e]) / (gamma b)).
  template <typename Emit>
  void project(const Vector& alpha, int64_t e, Emit&& emit) {
    for (int64_t t = 0; t < tokens_; ++t) u_[t] = alpha[t] + columns_[e * tokens_ + t];
    select(u_.data(), 1, tokens_, k_, picks_);
    if (picks_.empty()) return;
    const double tau = simplex_threshold(u_.data(), scale_, picks_);
    const double largest = u_[picks_[0].index];
    for (const auto& pick : picks_) {
      const double p = (u_[pick.index] - largest) / scale_ - tau;
      if (p > 0) emit(pick.index, p);
    }
  }

  // The negated objective, to be minimised, and its gradient.
  double evaluate(const Vector& alpha, Vector& gradient) {
    double value = -dot(alpha, there_);
    for (int64_t t = 0; t < tokens_; ++t) gradient[t] = -there_[t];
    for (int64_t e = 0; e < E_; ++e) {
      project(alpha, e, [&](int64_t t, double p) {
        value += b_ * (u_[t] * p - scale_ / 2 * p * p);
        gradient[t] += b_ * p;
      });
    }
    return value;
  }

  template <typename T>
  void write_plan(const Vector& alpha, T* plan) {
    std::fill(plan, plan + tokens_ * E_, bad_ ? std::numeric_limits<T>::quiet_NaN() : T{0});
    if (!solvable()) return;
    for (int64_t e = 0; e < E_; ++e) {
      project(alpha, e, [&](int64_t t, double p) { plan[t * E_ + e] = static_cast<T>(b_ * p); });
    }
  }

 private:
  int64_t tokens_, E_, k_;
  double b_ = 0, scale_ = 0;
  bool bad_ = false;
  Vector columns_;  // [E, T]
  Vector u_, there_;
  std::vector<Pick<OrderKey<double>>> picks_;
};

void adam(SemiDual& dual, Vector& alpha, const TransportOptions& options) {
  Vector gradient(alpha.size()), mean(alpha.size(), 0), square(alpha.size(), 0);
  double decay1 = 1, decay2 = 1;
  for (int64_t i = 0; i < options.iterations; ++i) {
    dual.evaluate(alpha, gradient);
    decay1 *= 0.9;
    decay2 *= 0.999;
    for (size_t t = 0; t < alpha.size(); ++t) {
      mean[t] = 0.9 * mean[t] + 0.1 * gradient[t];
      square[t] = 0.999 * square[t] + 0.001 * gradient[t] * gradient[t];
      alpha[t] -= options.learning_rate * (mean[t] / (1 - decay1)) /
                  (std::sqrt(square[t] / (1 - decay2)) + 1e-8);
    }
    if (std::sqrt(dot(gradient, gradient)) <= options.tolerance) return;
  }
}

void lbfgs(SemiDual& dual, Vector& alpha, const TransportOptions& options) {
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
    SemiDual dual(similarity + g * tokens * E, tokens, E, options.k, options.gamma);
    Vector alpha(tokens, 0);
    if (dual.solvable()) {
      (options.solver == Solver::kAdam ? adam : lbfgs)(dual, alpha, options);
    }
    dual.write_plan(alpha, plan + g * tokens * E);
  }
}

template void ksparse_transport(
    const float*, float*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t);
template void ksparse_transport(
    const double*, double*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
