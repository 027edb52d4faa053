#include "../sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace vmoe::cpu {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// std::max ignores NaN; here it replaces the maximum and stays.
double max_or_nan(double high, double value) {
  return !(value <= high) && !std::isnan(high) ? value : high;
}

// One group's problem: M = logits / epsilon, its tokens and potentials.
template <typename T>
struct Problem {
  const T* logits;
  int64_t tokens;
  int64_t E;
  double inverse_epsilon;
  double log_marginal = 0;                 // log(n / E)
  std::vector<double> f{}, h{};            // [T], [E]
  std::vector<double> high{}, total{};     // [E], scratch of the column update

  Problem(const T* logits_, int64_t tokens_, int64_t E_, double epsilon)
      : logits(logits_), tokens(tokens_), E(E_), inverse_epsilon(1 / epsilon) {
    f.assign(tokens, 0);
    h.assign(E, 0);
    int64_t present = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      bool any = false;
      for (int64_t e = 0; e < E; ++e) any |= !(logits[t * E + e] == -kInf);
      present += any;
    }
    log_marginal = std::log(static_cast<double>(present) / static_cast<double>(E));
  }

  double M(int64_t t, int64_t e) const { return logits[t * E + e] * inverse_epsilon; }

  // total[e] = logsumexp_t(M[t, e] + f[t]); -inf for a column that no token can reach.
  void column_logsumexp() {
    high.assign(E, -kInf);
    total.assign(E, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) high[e] = max_or_nan(high[e], M(t, e) + f[t]);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        if (high[e] != -kInf) total[e] += std::exp(M(t, e) + f[t] - high[e]);
      }
    }
    for (int64_t e = 0; e < E; ++e) {
      total[e] = high[e] == -kInf ? -kInf : high[e] + std::log(total[e]);
    }
  }

  // f = -logsumexp_e(M + h); -inf for an absent token, whose plan is then 0.
  void row_update() {
    for (int64_t t = 0; t < tokens; ++t) {
      double top = -kInf, sum = 0;
      for (int64_t e = 0; e < E; ++e) top = max_or_nan(top, M(t, e) + h[e]);
      if (top == -kInf) {
        f[t] = -kInf;
        continue;
      }
      for (int64_t e = 0; e < E; ++e) sum += std::exp(M(t, e) + h[e] - top);
      f[t] = -(top + std::log(sum));
    }
  }

  void column_update() {
    for (int64_t e = 0; e < E; ++e) h[e] = total[e] == -kInf ? -kInf : log_marginal - total[e];
  }

  // Relative deviation of the column sums, `total` being that of the current f.
  double column_error() const {
    if (log_marginal == -kInf) return 0;  // nobody is there
    double worst = 0;
    for (int64_t e = 0; e < E; ++e) {
      const double ratio = total[e] == -kInf ? 0 : std::exp(total[e] + h[e] - log_marginal);
      const double off = std::abs(ratio - 1);
      if (!(off <= worst)) worst = off;  // NaN stays
    }
    return worst;
  }
};

}  // namespace

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t tokens,
    int64_t E, int64_t iterations, double epsilon, double tolerance, int64_t group_begin,
    int64_t group_end) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    Problem<T> problem(logits + g * tokens * E, tokens, E, epsilon);
    double* kept = history + g * iterations * E;
    std::fill(kept, kept + iterations * E, 0);
    int64_t step = 0;
    for (; step < iterations; ++step) {
      problem.column_logsumexp();
      if (tolerance > 0 && step > 0 && problem.column_error() <= tolerance) break;
      problem.column_update();
      problem.row_update();
      std::copy(problem.h.begin(), problem.h.end(), kept + step * E);
    }
    if (step == iterations) problem.column_logsumexp();
    steps[g] = static_cast<int32_t>(step);
    error[g] = problem.column_error();
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        plan[(g * tokens + t) * E + e] =
            static_cast<T>(std::exp(problem.M(t, e) + problem.f[t] + problem.h[e]));
      }
    }
  }
}

// With P_i = exp(M + f_i + h_i) the plan after row update i, and
// Q_i = exp(M + f_{i-1} + h_i) / (n/E) the columns' softmax of iteration i:
//   f_i moves by -P_i (dM + dh_i) summed over e, h_i by -Q_i (dM + df_{i-1}) over t.
template <typename T>
void sinkhorn_backward(
    const T* grad, const T* logits, const double* history, const int32_t* steps, T* grad_logits,
    int64_t tokens, int64_t E, int64_t iterations, double epsilon, int64_t group_begin,
    int64_t group_end) {
  std::vector<double> out(tokens * E), df(tokens), dh(E);
  for (int64_t g = group_begin; g < group_end; ++g) {
    Problem<T> problem(logits + g * tokens * E, tokens, E, epsilon);
    const int64_t last = steps[g];
    const auto use_step = [&](int64_t step) {
      const double* kept = history + (g * iterations + step - 1) * E;
      std::copy(kept, kept + E, problem.h.begin());
    };
    const auto weight = [&](int64_t t, int64_t e) {
      return std::exp(problem.M(t, e) + problem.f[t] + problem.h[e]);
    };
    std::fill(out.begin(), out.end(), 0);
    if (last > 0) {
      use_step(last);
      problem.row_update();
    }
    std::fill(dh.begin(), dh.end(), 0);
    for (int64_t t = 0; t < tokens; ++t) {
      df[t] = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double d = grad[(g * tokens + t) * E + e] * weight(t, e);
        out[t * E + e] = d;
        df[t] += d;
        dh[e] += d;
      }
    }
    for (int64_t step = last; step > 0; --step) {
      // Row update: the potentials are those of this step.
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t e = 0; e < E; ++e) {
          const double d = df[t] * weight(t, e);
          out[t * E + e] -= d;
          dh[e] -= d;
        }
      }
      // Column update: f of the step before, h of this one.
      if (step == 1) {
        std::fill(problem.f.begin(), problem.f.end(), 0);
      } else {
        use_step(step - 1);
        problem.row_update();
        use_step(step);
      }
      const double inverse_marginal =
          problem.log_marginal == -kInf ? 0 : std::exp(-problem.log_marginal);
      for (int64_t t = 0; t < tokens; ++t) {
        df[t] = 0;
        for (int64_t e = 0; e < E; ++e) {
          const double d = dh[e] * weight(t, e) * inverse_marginal;
          out[t * E + e] -= d;
          df[t] -= d;
        }
      }
      std::fill(dh.begin(), dh.end(), 0);
      if (step > 1) use_step(step - 1);
    }
    for (int64_t i = 0; i < tokens * E; ++i) {
      grad_logits[g * tokens * E + i] = static_cast<T>(out[i] * problem.inverse_epsilon);
    }
  }
}

// Rows r and columns c of the plan kept fixed: with A = grad * plan, solve
//   r_t u_t + sum_e plan[t, e] v_e = sum_e A[t, e]
//   sum_t plan[t, e] u_t + c_e v_e = sum_t A[t, e]
// for (u, v), after eliminating u an E x E system; then d M = A - plan (u + v).
template <typename T>
void sinkhorn_implicit_backward(
    const T* grad, const T* plan, T* grad_logits, int64_t tokens, int64_t E, double epsilon,
    int64_t group_begin, int64_t group_end) {
  std::vector<double> L(E * E), c(E), v(E), u(tokens), row(tokens), row_grad(tokens);
  for (int64_t g = group_begin; g < group_end; ++g) {
    const T* P = plan + g * tokens * E;
    const T* dP = grad + g * tokens * E;
    std::fill(L.begin(), L.end(), 0);
    std::fill(c.begin(), c.end(), 0);
    std::fill(v.begin(), v.end(), 0);
    for (int64_t t = 0; t < tokens; ++t) {
      row[t] = row_grad[t] = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double p = P[t * E + e], a = p * dP[t * E + e];
        row[t] += p;
        row_grad[t] += a;
        v[e] += a;
        c[e] += p;
        L[e * E + e] += p;
      }
      if (row[t] == 0) continue;  // an absent token
      for (int64_t e = 0; e < E; ++e) {
        const double share = P[t * E + e] / row[t];
        v[e] -= share * row_grad[t];
        for (int64_t j = 0; j <= e; ++j) L[e * E + j] -= share * P[t * E + j];
      }
    }
    // Cholesky of a semi-definite matrix: adding a constant to v and taking it from
    // u changes nothing, so (at least) one pivot vanishes and its v may be 0.
    for (int64_t j = 0; j < E; ++j) {
      double pivot = L[j * E + j];
      for (int64_t i = 0; i < j; ++i) pivot -= L[j * E + i] * L[j * E + i];
      const bool free = j == E - 1 || pivot <= 1e-12 * c[j];
      const double diagonal = free ? 0 : std::sqrt(pivot);
      L[j * E + j] = diagonal;
      for (int64_t k = j + 1; k < E; ++k) {
        double value = L[k * E + j];
        for (int64_t i = 0; i < j; ++i) value -= L[k * E + i] * L[j * E + i];
        L[k * E + j] = free ? 0 : value / diagonal;
      }
    }
    for (int64_t j = 0; j < E; ++j) {
      for (int64_t i = 0; i < j; ++i) v[j] -= L[j * E + i] * v[i];
      v[j] = L[j * E + j] == 0 ? 0 : v[j] / L[j * E + j];
    }
    for (int64_t j = E - 1; j >= 0; --j) {
      for (int64_t i = j + 1; i < E; ++i) v[j] -= L[i * E + j] * v[i];
      v[j] = L[j * E + j] == 0 ? 0 : v[j] / L[j * E + j];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      u[t] = row_grad[t];
      for (int64_t e = 0; e < E; ++e) u[t] -= P[t * E + e] * v[e];
      u[t] = row[t] == 0 ? 0 : u[t] / row[t];
      for (int64_t e = 0; e < E; ++e) {
        const int64_t i = t * E + e;
        grad_logits[g * tokens * E + i] =
            static_cast<T>(P[i] * (dP[i] - u[t] - v[e]) / epsilon);
      }
    }
  }
}

#define VMOE_INSTANTIATE(T)                                                                       \
  template void sinkhorn(                                                                         \
      const T*, T*, double*, double*, int32_t*, int64_t, int64_t, int64_t, double, double,       \
      int64_t, int64_t);                                                                          \
  template void sinkhorn_backward(                                                                \
      const T*, const T*, const double*, const int32_t*, T*, int64_t, int64_t, int64_t, double,  \
      int64_t, int64_t);                                                                          \
  template void sinkhorn_implicit_backward(                                                       \
      const T*, const T*, T*, int64_t, int64_t, double, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu
