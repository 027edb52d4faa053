#include "../sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace vmoe::cpu::VMOE_ISA {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// std::max ignores NaN; here it replaces the maximum and stays.
double max_or_nan(double high, double value) {
  return !(value <= high) && !std::isnan(high) ? value : high;
}

// What both domains know of a group: M = logits / epsilon and how many tokens are there.
template <typename T>
struct Group {
  const T* logits;
  int64_t tokens;
  int64_t E;
  double inverse_epsilon;
  double log_marginal;              // log(n / E)
  double high = -kInf, low = kInf;  // of the M that are not -inf; NaN stays
  bool complete = true;             // no -inf but in the rows of absent tokens

  Group(const T* logits_, int64_t tokens_, int64_t E_, double epsilon)
      : logits(logits_), tokens(tokens_), E(E_), inverse_epsilon(1 / epsilon) {
    int64_t present = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t reachable = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double m = M(t, e);
        if (m == -kInf) continue;
        ++reachable;
        high = max_or_nan(high, m);
        low = std::min(low, m);
      }
      present += reachable > 0;
      complete = complete && (reachable == 0 || reachable == E);
    }
    log_marginal = std::log(static_cast<double>(present) / static_cast<double>(E));
  }

  double M(int64_t t, int64_t e) const { return logits[t * E + e] * inverse_epsilon; }

  // exp(M) and every product with a potential fit float64 where the logits are no
  // further apart than this: |potentials| <= spread + log, and products have two. With
  // forbidden pairs there may be no plan, and potentials grow with the iterations.
  bool fits_scaling() const { return complete && high > -kInf && high - low <= 200; }
};

// The iteration on the potentials' logarithms: right for any logits, an exp for
// every entry and update.
template <typename T>
class LogDomain {
 public:
  explicit LogDomain(const Group<T>& group)
      : group_(group), f_(group.tokens, 0), h_(group.E, 0), high_(group.E), total_(group.E) {}

  // total[e] = logsumexp_t(M[t, e] + f[t]); -inf for a column that no token can reach.
  void sum_columns() {
    std::fill(high_.begin(), high_.end(), -kInf);
    std::fill(total_.begin(), total_.end(), 0);
    for (int64_t t = 0; t < group_.tokens; ++t) {
      for (int64_t e = 0; e < group_.E; ++e)
        high_[e] = max_or_nan(high_[e], group_.M(t, e) + f_[t]);
    }
    for (int64_t t = 0; t < group_.tokens; ++t) {
      for (int64_t e = 0; e < group_.E; ++e) {
        if (high_[e] != -kInf) total_[e] += std::exp(group_.M(t, e) + f_[t] - high_[e]);
      }
    }
    for (int64_t e = 0; e < group_.E; ++e) {
      total_[e] = high_[e] == -kInf ? -kInf : high_[e] + std::log(total_[e]);
    }
  }

  void update_columns() {
    for (int64_t e = 0; e < group_.E; ++e) {
      h_[e] = total_[e] == -kInf ? -kInf : group_.log_marginal - total_[e];
    }
  }

  // f = -logsumexp_e(M + h); -inf for an absent token, whose plan is then 0.
  void update_rows() {
    for (int64_t t = 0; t < group_.tokens; ++t) {
      double top = -kInf, sum = 0;
      for (int64_t e = 0; e < group_.E; ++e) top = max_or_nan(top, group_.M(t, e) + h_[e]);
      for (int64_t e = 0; e < group_.E && top != -kInf; ++e) {
        sum += std::exp(group_.M(t, e) + h_[e] - top);
      }
      f_[t] = top == -kInf ? -kInf : -(top + std::log(sum));
    }
  }

  // Deviation of column e's sum from n/E, as a ratio; after sum_columns().
  double ratio(int64_t e) const {
    return total_[e] == -kInf ? 0 : std::exp(total_[e] + h_[e] - group_.log_marginal);
  }

  double weight(int64_t t, int64_t e) const { return std::exp(group_.M(t, e) + f_[t] + h_[e]); }
  void clear_rows() { std::fill(f_.begin(), f_.end(), 0); }
  void get_columns(double* h) const { std::copy(h_.begin(), h_.end(), h); }
  void set_columns(const double* h) { std::copy(h, h + group_.E, h_.begin()); }

 private:
  const Group<T>& group_;
  std::vector<double> f_, h_, high_, total_;
};

// The same on exp(M): an exp for every entry once, products after that. Where
// Group::fits_scaling().
template <typename T>
class ScalingDomain {
 public:
  explicit ScalingDomain(const Group<T>& group)
      : group_(group), K_(group.tokens * group.E), u_(group.tokens), v_(group.E), total_(group.E) {
    // Shifted by the largest entry, which f = 0 and the h handed out undo.
    for (int64_t t = 0; t < group.tokens; ++t) {
      for (int64_t e = 0; e < group.E; ++e) {
        K_[t * group.E + e] = std::exp(group.M(t, e) - group.high);
      }
    }
    clear_rows();
  }

  void sum_columns() {
    std::fill(total_.begin(), total_.end(), 0);
    for (int64_t t = 0; t < group_.tokens; ++t) {
      const double* row = K_.data() + t * group_.E;
      for (int64_t e = 0; e < group_.E; ++e) total_[e] += row[e] * u_[t];
    }
  }

  void update_columns() {
    const double marginal = std::exp(group_.log_marginal);
    for (int64_t e = 0; e < group_.E; ++e) v_[e] = total_[e] == 0 ? 0 : marginal / total_[e];
  }

  void update_rows() {
    for (int64_t t = 0; t < group_.tokens; ++t) {
      const double* row = K_.data() + t * group_.E;
      double sum = 0;
      for (int64_t e = 0; e < group_.E; ++e) sum += row[e] * v_[e];
      u_[t] = sum == 0 ? 0 : 1 / sum;
    }
  }

  double ratio(int64_t e) const { return total_[e] * v_[e] / std::exp(group_.log_marginal); }
  double weight(int64_t t, int64_t e) const { return u_[t] * K_[t * group_.E + e] * v_[e]; }
  void clear_rows() { std::fill(u_.begin(), u_.end(), 1); }

  void get_columns(double* h) const {
    for (int64_t e = 0; e < group_.E; ++e) h[e] = std::log(v_[e]) - group_.high;
  }
  void set_columns(const double* h) {
    for (int64_t e = 0; e < group_.E; ++e) v_[e] = std::exp(h[e] + group_.high);
  }

 private:
  const Group<T>& group_;
  std::vector<double> K_, u_, v_, total_;
};

// body(domain) with the domain that the group's logits allow.
template <typename T, typename Body>
void in_domain(const Group<T>& group, Body&& body) {
  if (group.fits_scaling()) {
    body(ScalingDomain<T>(group));
  } else {
    body(LogDomain<T>(group));
  }
}

// max_e |column sum / (n/E) - 1|; NaN stays.
template <typename Domain>
double column_error(const Domain& domain, int64_t E, double log_marginal) {
  if (log_marginal == -kInf) return 0;  // nobody is there
  double worst = 0;
  for (int64_t e = 0; e < E; ++e) worst = max_or_nan(worst, std::abs(domain.ratio(e) - 1));
  return worst;
}

}  // namespace

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t tokens,
    int64_t E, int64_t iterations, double epsilon, double tolerance, int64_t group_begin,
    int64_t group_end) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    const Group<T> group(logits + g * tokens * E, tokens, E, epsilon);
    double* kept = history + g * iterations * E;
    std::fill(kept, kept + iterations * E, 0);
    in_domain(group, [&](auto domain) {
      int64_t step = 0;
      for (; step < iterations; ++step) {
        domain.sum_columns();
        if (tolerance > 0 && step > 0 && column_error(domain, E, group.log_marginal) <= tolerance) {
          break;
        }
        domain.update_columns();
        domain.update_rows();
        domain.get_columns(kept + step * E);
      }
      if (step == iterations) domain.sum_columns();
      steps[g] = static_cast<int32_t>(step);
      error[g] = column_error(domain, E, group.log_marginal);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t e = 0; e < E; ++e) {
          plan[(g * tokens + t) * E + e] = static_cast<T>(domain.weight(t, e));
        }
      }
    });
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
    const Group<T> group(logits + g * tokens * E, tokens, E, epsilon);
    const double* kept = history + g * iterations * E;
    const double inverse_marginal = group.log_marginal == -kInf ? 0 : std::exp(-group.log_marginal);
    in_domain(group, [&](auto domain) {
      const auto use_columns = [&](int64_t step) { domain.set_columns(kept + (step - 1) * E); };
      int64_t step = steps[g];
      if (step > 0) {
        use_columns(step);
        domain.update_rows();
      }
      std::fill(dh.begin(), dh.end(), 0);
      for (int64_t t = 0; t < tokens; ++t) {
        df[t] = 0;
        for (int64_t e = 0; e < E; ++e) {
          const double d = grad[(g * tokens + t) * E + e] * domain.weight(t, e);
          out[t * E + e] = d;
          df[t] += d;
          dh[e] += d;
        }
      }
      for (; step > 0; --step) {
        // Row update: the potentials are those of this step.
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t e = 0; e < E; ++e) {
            const double d = df[t] * domain.weight(t, e);
            out[t * E + e] -= d;
            dh[e] -= d;
          }
        }
        // Column update: f of the step before, h of this one.
        if (step == 1) {
          domain.clear_rows();
        } else {
          use_columns(step - 1);
          domain.update_rows();
          use_columns(step);
        }
        for (int64_t t = 0; t < tokens; ++t) {
          df[t] = 0;
          for (int64_t e = 0; e < E; ++e) {
            const double d = dh[e] * domain.weight(t, e) * inverse_marginal;
            out[t * E + e] -= d;
            df[t] -= d;
          }
        }
        std::fill(dh.begin(), dh.end(), 0);
        if (step > 1) use_columns(step - 1);
      }
    });
    for (int64_t i = 0; i < tokens * E; ++i) {
      grad_logits[g * tokens * E + i] = static_cast<T>(out[i] * group.inverse_epsilon);
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
        grad_logits[g * tokens * E + i] = static_cast<T>(P[i] * (dP[i] - u[t] - v[e]) / epsilon);
      }
    }
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void sinkhorn(                                                                          \
      const T*, T*, double*, double*, int32_t*, int64_t, int64_t, int64_t, double, double,         \
      int64_t, int64_t);                                                                           \
  template void sinkhorn_backward(                                                                 \
      const T*, const T*, const double*, const int32_t*, T*, int64_t, int64_t, int64_t, double,    \
      int64_t, int64_t);                                                                           \
  template void sinkhorn_implicit_backward(                                                        \
      const T*, const T*, T*, int64_t, int64_t, double, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
