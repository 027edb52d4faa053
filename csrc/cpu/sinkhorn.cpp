#include "../sinkhorn.h"

#include "sinkhorn/gradient.h"
#include "sinkhorn/logs.h"
#include "sinkhorn/scaling.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// max_e |column sum / (n/E) - 1|. NaN gives NaN.
template <typename Domain>
double column_error(const Domain& domain, int64_t E, double log_marginal) {
  if (log_marginal == -kInfinity) return 0;  // no token is present
  double worst = 0;
  for (int64_t e = 0; e < E; ++e) worst = max_or_nan(worst, std::abs(domain.ratio(e) - 1));
  return worst;
}

struct Outputs {
  double* history;
  double* error;
  int32_t* steps;
};

// The forward pass of one group, on exponentials or logarithms.
template <typename T, typename Domain>
void iterate(
    Domain& domain, const Group<T>& group, int64_t iterations, double tolerance,
    const Outputs& out) {
  domain.start();
  int64_t step = 0, same = 0;
  for (; step < iterations; ++step) {
    if (tolerance > 0 && step > 0 &&
        column_error(domain, group.E, group.log_marginal) <= tolerance) {
      break;
    }
    if (!domain.step_columns() && step > 0) {
      // Converged: the remaining iterations would change nothing.
      same = iterations - step;
      break;
    }
    domain.step_rows(step + 1 == iterations);
    domain.get_columns(out.history + step * group.E);
  }
  for (double* h = out.history + step * group.E; h < out.history + (step + same) * group.E; ++h) {
    *h = *(h - group.E);
  }
  *out.steps = static_cast<int32_t>(step + same);
  *out.error = column_error(domain, group.E, group.log_marginal);
  if (step < iterations) domain.write_plan();
}

// The backward pass of one group on logarithms, with one exp per entry and update.
template <typename T>
void backward_by_logs(
    const Group<T>& group, const T* grad, const double* history, int64_t step, T* grad_logits) {
  const int64_t tokens = group.tokens, E = group.E;
  const double inverse_marginal =
      group.log_marginal == -kInfinity ? 0 : std::exp(-group.log_marginal);
  std::vector<double> out(tokens * E), df(tokens), dh(E, 0);
  LogDomain<T> domain(group, grad_logits);
  const auto use_columns = [&](int64_t i) { domain.set_columns(history + (i - 1) * E); };
  if (step > 0) {
    use_columns(step);
    domain.update_rows();
  }
  domain.reduce_columns(dh, 0, std::plus<>(), [&](int64_t t, int64_t e) {
    const double d = grad[t * E + e] * domain.weight(t, e);
    out[t * E + e] = d;
    df[t] += d;
    return d;
  });
  std::vector<double> taken(E);
  for (; step > 0; --step) {
    // Row update i, with the potentials f_i and h_i.
    domain.reduce_columns(taken, 0, std::plus<>(), [&](int64_t t, int64_t e) {
      const double d = df[t] * domain.weight(t, e);
      out[t * E + e] -= d;
      return d;
    });
    for (int64_t e = 0; e < E; ++e) dh[e] -= taken[e];
    // Column update i, with the potentials f_{i-1} and h_i.
    if (step == 1) {
      domain.clear_rows();
    } else {
      use_columns(step - 1);
      domain.update_rows();
      use_columns(step);
    }
    domain.each_token([&](int64_t t) {
      df[t] = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double d = dh[e] * domain.weight(t, e) * inverse_marginal;
        out[t * E + e] -= d;
        df[t] -= d;
      }
    });
    std::fill(dh.begin(), dh.end(), 0);
    if (step > 1) use_columns(step - 1);
  }
  for (int64_t i = 0; i < tokens * E; ++i) {
    grad_logits[i] = static_cast<T>(out[i] * group.inverse_epsilon);
  }
}

}  // namespace

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t tokens,
    int64_t E, int64_t iterations, double epsilon, double tolerance, int64_t group_begin,
    int64_t group_end, const Parallel& parallel) {
  // Sums in float32 have a rounding error of about 1e-7, so a tolerance near 1e-7 needs float64.
  const bool narrow_will_do = !(tolerance > 0 && tolerance < 1e-4);
  ScalingDomain<T, T> scaling;
  ScalingDomain<T, double> wide;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const Group<T> group(logits + g * tokens * E, tokens, E, epsilon, parallel);
    T* out_plan = plan + g * tokens * E;
    const Outputs out{history + g * iterations * E, error + g, steps + g};
    std::fill(out.history, out.history + iterations * E, 0);
    if (narrow_will_do && group.template fits_scaling<T>()) {
      scaling.reset(group, out_plan);
      iterate(scaling, group, iterations, tolerance, out);
    } else if (group.template fits_scaling<double>()) {
      wide.reset(group, out_plan);
      iterate(wide, group, iterations, tolerance, out);
    } else {
      LogDomain<T> logarithms(group, out_plan);
      iterate(logarithms, group, iterations, tolerance, out);
    }
  }
}

// P_i = exp(M + f_i + h_i) is the plan after row update i. Q_i = exp(M + f_{i-1} + h_i) / (n/E) is
// the softmax over columns in iteration i. The derivatives are
//   df_i = -sum_e P_i (dM + dh_i),   dh_i = -sum_t Q_i (dM + df_{i-1}).
template <typename T>
void sinkhorn_backward(
    const T* grad, const T* logits, const double* history, const int32_t* steps, T* grad_logits,
    int64_t tokens, int64_t E, int64_t iterations, double epsilon, int64_t group_begin,
    int64_t group_end, const Parallel& parallel) {
  ScalingGradient<T, T> scaling;
  ScalingGradient<T, double> wide;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t at = g * tokens * E;
    const Group<T> group(logits + at, tokens, E, epsilon, parallel);
    const double* kept = history + g * iterations * E;
    // `steps` is untrusted: clamp it.
    const int64_t done = std::clamp<int64_t>(steps[g], 0, iterations);
    if (done > 0 && group.template fits_scaling<T>()) {
      scaling.reset(group, grad_logits + at);
      scaling.backward(grad + at, kept, done);
    } else if (done > 0 && group.template fits_scaling<double>()) {
      wide.reset(group, grad_logits + at);
      wide.backward(grad + at, kept, done);
    } else {
      backward_by_logs(group, grad + at, kept, done, grad_logits + at);
    }
  }
}

// The row sums r and the column sums c of the plan are constant. With A = grad * plan, solve
//   r_t u_t + sum_e plan[t, e] v_e = sum_e A[t, e]
//   sum_t plan[t, e] u_t + c_e v_e = sum_t A[t, e]
// for (u, v): eliminating u leaves an E x E system. Then d M = A - plan (u + v).
template <typename T>
void sinkhorn_implicit_backward(
    const T* grad, const T* plan, T* grad_logits, int64_t tokens, int64_t E, double epsilon,
    int64_t group_begin, int64_t group_end, const Parallel&) {
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
      if (row[t] == 0) continue;  // a masked token
      for (int64_t e = 0; e < E; ++e) {
        const double share = P[t * E + e] / row[t];
        v[e] -= share * row_grad[t];
        for (int64_t j = 0; j <= e; ++j) L[e * E + j] -= share * P[t * E + j];
      }
    }
    // Cholesky factorisation of a semi-definite matrix. Adding a constant to v and subtracting the
    // constant from u changes nothing. So at least one pivot is 0. v is set to 0 at such a pivot.
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
      int64_t, int64_t, const Parallel&);                                                          \
  template void sinkhorn_backward(                                                                 \
      const T*, const T*, const double*, const int32_t*, T*, int64_t, int64_t, int64_t, double,    \
      int64_t, int64_t, const Parallel&);                                                          \
  template void sinkhorn_implicit_backward(                                                        \
      const T*, const T*, T*, int64_t, int64_t, double, int64_t, int64_t, const Parallel&);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
