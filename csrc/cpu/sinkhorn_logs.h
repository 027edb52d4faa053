// sinkhorn_logs -- the iteration on logarithms.
#pragma once

#include "sinkhorn_group.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The iteration on the potentials' logarithms: right for any logits, an exp for
// every entry and update.
template <typename T>
class LogDomain {
 public:
  LogDomain(const Group<T>& group, T* out)
      : group_(group),
        out_(out),
        f_(group.tokens, 0),
        h_(group.E, 0),
        high_(group.E),
        total_(group.E),
        partial_(group.pieces * group.E) {}

  // The updates of the iteration; each row update leaves the columns' sums behind.
  void start() { sum_columns(); }
  bool step_columns() {
    bool moved = false;
    for (int64_t e = 0; e < group_.E; ++e) {
      const double h = total_[e] == -kInf ? -kInf : group_.log_marginal - total_[e];
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

  // total[e] = logsumexp_t(M[t, e] + f[t]); -inf for a column that no token can reach.
  void sum_columns() {
    reduce_columns(
        high_, -kInf, max_or_nan, [&](int64_t t, int64_t e) { return group_.M(t, e) + f_[t]; });
    reduce_columns(total_, 0, std::plus<>(), [&](int64_t t, int64_t e) {
      return high_[e] == -kInf ? 0 : std::exp(group_.M(t, e) + f_[t] - high_[e]);
    });
    for (int64_t e = 0; e < group_.E; ++e) {
      total_[e] = high_[e] == -kInf ? -kInf : high_[e] + std::log(total_[e]);
    }
  }

  // f = -logsumexp_e(M + h); -inf for an absent token, whose plan is then 0.
  void update_rows() {
    each_token([&](int64_t t) {
      double top = -kInf, sum = 0;
      for (int64_t e = 0; e < group_.E; ++e) top = max_or_nan(top, group_.M(t, e) + h_[e]);
      for (int64_t e = 0; e < group_.E && top != -kInf; ++e) {
        sum += std::exp(group_.M(t, e) + h_[e] - top);
      }
      f_[t] = top == -kInf ? -kInf : -(top + std::log(sum));
    });
  }

  // Deviation of column e's sum from n/E, as a ratio; after sum_columns().
  double ratio(int64_t e) const {
    return total_[e] == -kInf ? 0 : std::exp(total_[e] + h_[e] - group_.log_marginal);
  }

  double weight(int64_t t, int64_t e) const { return std::exp(group_.M(t, e) + f_[t] + h_[e]); }
  void write_plan() const {
    each_token([&](int64_t t) {
      for (int64_t e = 0; e < group_.E; ++e) {
        out_[t * group_.E + e] = static_cast<T>(weight(t, e));
      }
    });
  }
  void clear_rows() { std::fill(f_.begin(), f_.end(), 0); }
  void get_columns(double* h) const { std::copy(h_.begin(), h_.end(), h); }
  void set_columns(const double* h) { std::copy(h, h + group_.E, h_.begin()); }

  template <typename Body>
  void each_token(Body&& body) const {
    group_.each_piece([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(t);
    });
  }

  // out[e] = the values (t, e) of all tokens, joined.
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
  const Group<T>& group_;
  T* out_;
  std::vector<double> f_, h_, high_, total_;
  std::vector<double> partial_;  // [pieces, E]
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
