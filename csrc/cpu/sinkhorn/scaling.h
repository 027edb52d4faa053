// sinkhorn/scaling -- the iteration on exponentials, for groups whose exponentials fit their type.
#pragma once

#include "matrix.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The iteration on K: one exp per entry at the start, then products only.
//
// The potentials are exp(f_t) = u_t exp(-max M - log_scale) and
// exp(h_e) = v_e exp(log_scale), with max v = 1.
template <typename T, typename C>
class ScalingDomain {
  using Matrix = ScalingMatrix<T, C>;
  static constexpr int64_t W = Matrix::W, kTogether = Matrix::kTogether;

 public:
  void reset(const Group<T>& group, T* out) {
    matrix_.reset(group, out);
    u_.make(matrix_.blocks() * W);
    v_.assign(group.E + kWidth<double>, 0);
  }

  // Computes K, and the column sums at f = 0.
  void start() {
    log_scale_ = -group().high * group().inverse_epsilon;
    matrix_.sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
      Vec<C> u[count];
      for (int i = 0; i < count; ++i) {
        matrix_.fill_block(b + i);
        u[i] = splat(C{1});
      }
      matrix_.template add_columns<count>(b, u, sums);
    });
  }

  bool step_columns() {
    const double* total = matrix_.total();
    const double least = *std::min_element(total, total + E());
    log_scale_ += group().log_marginal - std::log(least);
    bool moved = false;
    for (int64_t e = 0; e < E(); ++e) {
      const double v = least / total[e];
      // Ignores changes below the rounding error, because the last bit could oscillate for ever.
      if (std::abs(v - v_[e]) <= 0.75 * std::numeric_limits<C>::epsilon() * v) continue;
      v_[e] = static_cast<C>(v);
      moved = true;
    }
    return moved;
  }

  // One pass computes the row update and the column sums for the next column update. In the last
  // step the pass also computes the plan. A visit computes the row sums of some blocks, and adds
  // the preceding blocks to the column sums. So the row sums and the column sums of a visit do not
  // depend on each other. The preceding blocks are still in the cache.
  void step_rows(bool last) {
    matrix_.sum_pieces(last ? E() : 0, [&](int64_t begin, int64_t end, C* sums, C* tile) {
      Vec<C> before[kTogether]{};  // initialised, because the compiler warns otherwise
      int64_t count = 0;
      const auto add_before = [&](auto next, int64_t b, Vec<C>* rows) {
        const C* v = v_.data();
        count == kTogether ? matrix_.template visit<kTogether, next>(b, v, before, rows, sums)
        : count > 0        ? matrix_.template visit<1, next>(b, v, before, rows, sums)
                           : matrix_.template visit<0, next>(b, v, before, rows, sums);
        for (int64_t i = b - count; i < b; ++i) {
          const Vec<C> u = before[i - (b - count)];
          last ? write_block(i, u, tile) : store(&u_[i * W], u);
        }
        count = next;
        for (int i = 0; i < next; ++i) before[i] = Matrix::inverse(rows[i]);
      };
      Vec<C> rows[kTogether];
      matrix_.each_few(begin, end, [&](auto next, int64_t b) { add_before(next, b, rows); });
      add_before(std::integral_constant<int, 0>{}, end, rows);
    });
  }

  double ratio(int64_t e) const { return matrix_.total()[e] * v_[e] / group().marginal(); }

  void get_columns(double* h) const {
    for (int64_t e = 0; e < E(); e += kWidth<double>) {
      const Vec<double> value = log_scale_ + log(widen(&v_[e]));
      const int64_t width = E() - e;
      width < kWidth<double> ? store_some(h + e, value, width) : store(h + e, value);
    }
  }

  void write_plan() {
    matrix_.each_block(E(), [&](int64_t b, C* tile) { write_block(b, load(&u_[b * W]), tile); });
  }

 private:
  const Group<T>& group() const { return matrix_.group(); }
  int64_t E() const { return matrix_.E(); }

  void write_block(int64_t b, Vec<C> u, C* tile) const {
    for (int64_t e = 0; e < E(); ++e) store(tile + e * W, u * matrix_.K(b, e) * v_[e]);
    matrix_.unpack(b, tile);
  }

  Matrix matrix_;
  double log_scale_ = 0;
  Buffer<C> u_;       // [blocks, W]
  std::vector<C> v_;  // [E], with room for a whole vector
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
