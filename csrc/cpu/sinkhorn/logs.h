// sinkhorn/logs -- the iteration on logarithms.
#pragma once

#include "group.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The iteration on the logarithms of the potentials. This iteration is correct for any logits. It
// takes one exp per entry and update.
//
// f_t = -top_t - log_sum_t is stored as two numbers. top_t is the largest M[t, e] + h_e. log_sum_t
// is the logarithm of sum_e exp(M[t, e] + h_e - top_t). So the rows of the plan sum to 1 even if
// top_t is so large that rounding top_t + log_sum_t would lose log_sum_t. A column update adds
// log(n/E) minus the logarithm of the plan's column sum to h_e.
template <typename T>
class LogDomain {
 public:
  LogDomain(const Group<T>& group, T* out)
      : group_(group),
        out_(out),
        top_(group.tokens, 0),
        log_sum_(group.tokens, 0),
        h_(group.E, 0),
        high_(group.E),
        total_(group.E),
        partial_(group.pieces * group.E) {}

  // The updates of an iteration. A row update also computes the column sums for the next column
  // update.
  void start() { sum_columns(); }
  bool step_columns() {
    bool moved = false;
    for (int64_t e = 0; e < group_.E; ++e) {
      const double h =
          total_[e] == -kInfinity ? -kInfinity : h_[e] + (group_.log_marginal - total_[e]);
      moved = moved || h != h_[e];
      h_[e] = h;
    }
    return moved;
  }
  void step_rows(bool last) {
    update_rows();
    sum_columns();
    if (last) write_plan();
  }

  // total[e] = logsumexp_t(log_weight(t, e)), or -inf for a column that no token can reach.
  void sum_columns() {
    reduce_columns(
        high_, -kInfinity, max_or_nan, [&](int64_t t, int64_t e) { return log_weight(t, e); });
    reduce_columns(total_, 0, std::plus<>(), [&](int64_t t, int64_t e) {
      return high_[e] == -kInfinity ? 0 : std::exp(log_weight(t, e) - high_[e]);
    });
    for (int64_t e = 0; e < group_.E; ++e) {
      total_[e] = high_[e] == -kInfinity ? -kInfinity : high_[e] + std::log(total_[e]);
    }
  }

  // f = -logsumexp_e(M + h), or -inf for a masked token, whose plan is then 0.
  void update_rows() {
    each_token([&](int64_t t) {
      double top = -kInfinity, sum = 0;
      for (int64_t e = 0; e < group_.E; ++e) top = max_or_nan(top, group_.M(t, e) + h_[e]);
      for (int64_t e = 0; e < group_.E && top != -kInfinity; ++e) {
        sum += std::exp(group_.M(t, e) + h_[e] - top);
      }
      top_[t] = top == -kInfinity ? 0 : top;
      log_sum_[t] = top == -kInfinity ? kInfinity : std::log(sum);
    });
  }

  // The sum of column e, divided by n/E. Valid after sum_columns().
  double ratio(int64_t e) const {
    return total_[e] == -kInfinity ? 0 : std::exp(total_[e] - group_.log_marginal);
  }

  double weight(int64_t t, int64_t e) const { return std::exp(log_weight(t, e)); }
  void write_plan() const {
    each_token([&](int64_t t) {
      for (int64_t e = 0; e < group_.E; ++e) {
        out_[t * group_.E + e] = static_cast<T>(weight(t, e));
      }
    });
  }
  void clear_rows() {
    std::fill(top_.begin(), top_.end(), 0);
    std::fill(log_sum_.begin(), log_sum_.end(), 0);
  }
  void get_columns(double* h) const { std::copy(h_.begin(), h_.end(), h); }
  void set_columns(const double* h) { std::copy(h, h + group_.E, h_.begin()); }

  template <typename Body>
  void each_token(Body&& body) const {
    group_.each_piece([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(t);
    });
  }

  // out[e] = join of value(t, e) over all tokens.
  template <typename Join, typename Value>
  void reduce_columns(std::vector<double>& out, double first, Join&& join, Value&& value) {
    group_.each_piece([&](int64_t piece, int64_t begin, int64_t end) {
      double* partial = partial_.data() + piece * group_.E;
      std::fill(partial, partial + group_.E, first);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t e = 0; e < group_.E; ++e) partial[e] = join(partial[e], value(t, e));
      }
    });
    std::fill(out.begin(), out.end(), first);
    for (int64_t i = 0; i < group_.pieces * group_.E; ++i) {
      double& joined = out[i % group_.E];
      joined = join(joined, partial_[i]);
    }
  }

 private:
  double log_weight(int64_t t, int64_t e) const {
    return group_.M(t, e) + h_[e] - top_[t] - log_sum_[t];
  }

  const Group<T>& group_;
  T* out_;
  std::vector<double> top_, log_sum_;     // [T]
  std::vector<double> h_, high_, total_;  // [E]
  std::vector<double> partial_;           // [pieces, E]
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
