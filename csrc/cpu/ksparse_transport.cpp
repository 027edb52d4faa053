#include "../ksparse_transport.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "ksparse_transport/semi_dual.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// One step of Adam with betas 0.9 and 0.999. mean_share and square_share are the bias corrections
// of the two moments. Returns the sum of the squared gradient entries.
double adam_step(
    int64_t size, double rate, double mean_share, double square_share, const double* gradient,
    double* mean, double* square, double* alpha) {
  Vec<double> squares{};
  for (int64_t t = 0; t < size; t += kWidth<double>) {
    const Vec<double> g = load(gradient + t);
    const Vec<double> m = 0.9 * load(mean + t) + 0.1 * g;
    const Vec<double> s = 0.999 * load(square + t) + 0.001 * g * g;
    const Vec<double> step = m * (rate / mean_share) / (sqrt(s * (1 / square_share)) + 1e-8);
    store(mean + t, m);
    store(square + t, s);
    store(alpha + t, load(alpha + t) - step);
    squares += g * g;
  }
  return sum<double>(squares);
}

template <typename T>
void adam(SemiDual<T>& dual, Vector& alpha, const TransportOptions& options) {
  constexpr int64_t kPiece = SemiDual<T>::kPiece;
  Vector gradient(alpha.size()), mean(alpha.size(), 0), square(alpha.size(), 0);
  // One sum per piece, so that the total does not depend on the number of threads.
  Vector squares(alpha.size() / kPiece + 1);
  double decay1 = 1, decay2 = 1;
  for (int64_t i = 0; i < options.iterations; ++i) {
    decay1 *= 0.9;
    decay2 *= 0.999;
    dual.differentiate(alpha, gradient, [&](int64_t begin, int64_t end) {
      squares[begin / kPiece] = adam_step(
          end - begin, options.learning_rate, 1 - decay1, 1 - decay2, &gradient[begin],
          &mean[begin], &square[begin], &alpha[begin]);
    });
    const double total = std::accumulate(squares.begin(), squares.end(), 0.0);
    if (std::sqrt(total) <= options.tolerance) return;
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
  dual.differentiate(alpha, gradient);
  double value = dual.value(alpha);
  for (int64_t i = 0; i < options.iterations; ++i) {
    const double length = std::sqrt(dot(gradient, gradient));
    if (!(length > options.tolerance)) return;
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
    // Without curvature pairs, the scale of the gradient does not predict a step length. So the
    // first step has length 1.
    double rate = memory.empty() ? 1 / length : 1;
    int halvings = 0;
    for (; halvings < kHalvings; ++halvings, rate /= 2) {
      for (size_t t = 0; t < n; ++t) next[t] = alpha[t] - rate * direction[t];
      dual.differentiate(next, next_gradient);
      const double next_value = dual.value(next);
      if (next_value <= value + 1e-4 * rate * slope) {
        value = next_value;
        break;
      }
    }
    if (halvings == kHalvings) {
      // At a kink the curvature pairs may give a direction in which no step improves the objective.
      // So steepest descent is tried once. If it fails too, the solver stops.
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

// Solves a group without masked tokens. Returns the value of the plan at masked tokens.
template <typename T>
T solve(
    const T* similarity, T* plan, int64_t tokens, int64_t E, const TransportOptions& options,
    const Parallel& parallel) {
  SemiDual<T> dual(similarity, tokens, E, options.k, options.gamma, parallel);
  Vector alpha(dual.size(), 0);
  if (dual.solvable()) {
    (options.solver == Solver::kAdam ? adam<T> : lbfgs<T>)(dual, alpha, options);
  }
  dual.write_plan(alpha, plan);
  return dual.elsewhere();
}

// Leaves masked tokens out of the problem, so that their logits cannot change any bit of the
// result.
template <typename T>
void solve_present(
    const T* similarity, T* plan, int64_t tokens, int64_t E, const TransportOptions& options,
    const Parallel& parallel) {
  const auto is_absent = [&](int64_t t) {
    const T* row = similarity + t * E;
    return std::all_of(row, row + E, [](T s) { return s == -std::numeric_limits<T>::infinity(); });
  };
  std::vector<char> absent(tokens);
  parallel(tokens, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) absent[t] = is_absent(t);
  });
  const int64_t present = std::count(absent.begin(), absent.end(), 0);
  if (present == tokens) {
    solve(similarity, plan, tokens, E, options, parallel);
    return;
  }
  std::vector<T> rows(present * E), of_rows(present * E);
  for (int64_t t = 0, row = 0; t < tokens; ++t) {
    if (!absent[t]) std::copy_n(similarity + t * E, E, &rows[E * row++]);
  }
  const T absent_value = solve(rows.data(), of_rows.data(), present, E, options, parallel);
  for (int64_t t = 0, row = 0; t < tokens; ++t) {
    if (absent[t]) {
      std::fill_n(plan + t * E, E, absent_value);
    } else {
      std::copy_n(&of_rows[E * row++], E, plan + t * E);
    }
  }
}

}  // namespace

template <typename T>
void ksparse_transport(
    const T* similarity, T* plan, int64_t tokens, int64_t E, const TransportOptions& options,
    int64_t group_begin, int64_t group_end, const Parallel& parallel) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    solve_present(similarity + g * tokens * E, plan + g * tokens * E, tokens, E, options, parallel);
  }
}

template void ksparse_transport(
    const float*, float*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t,
    const Parallel&);
template void ksparse_transport(
    const double*, double*, int64_t, int64_t, const TransportOptions&, int64_t, int64_t,
    const Parallel&);

}  // namespace vmoe::cpu::VMOE_ISA
