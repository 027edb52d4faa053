// sinkhorn/gradient -- the gradient of the iterations that were done, on exponentials.
#pragma once

#include <numeric>

#include "matrix.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The backward pass of one group (sinkhorn.cpp has the formulas). Between steps, only the
// potentials of P_i and Q_i change, so step i subtracts from the gradient at entry (t, e)
//   K[t, e] (a_i[t] v_i[e] + u_{i-1}[t] c_i[e]),   a_i = df_i u_i,  c_i = dh_i v_i / (n/E)
// Each step makes one pass over K to compute its vectors a, u, v and c. The vectors are stored. At
// the end, the sum of their products over the steps is multiplied by K.
//
// The columns of Q_i and the rows of P_i sum to 1. Hence the 1-norms |dh_i|, |df_{i-1}|,
// |dh_{i-1}|, ... never grow. Each norm bounds the terms that its step adds to the gradient. The
// remaining steps are skipped when the sum of their terms cannot exceed the rounding error of the
// first step.
template <typename T, typename C>
class ScalingGradient {
  using Matrix = ScalingMatrix<T, C>;
  static constexpr int64_t W = Matrix::W, kTogether = Matrix::kTogether;

 public:
  void reset(const Group<T>& group, T* out) {
    matrix_.reset(group, out);
    u_.make(matrix_.blocks() * W);
    v_.resize(group.E);
  }

  // Requires steps >= 1, the number of iterations in `history`.
  void backward(const T* grad, const double* history, int64_t steps) {
    const int64_t slots = std::min(steps, kCollected) + 1;
    slot_ = matrix_.blocks() | 1;  // odd: with a power of two, slots would share cache sets
    collected_.make(2 * slot_ * slots * W);
    of_column_.resize(slots * E());
    collected_count_ = 0;
    has_taken_ = false;
    dh_.resize(E());
    set_columns(history + (steps - 1) * E());
    last_v_ = v_;
    begin(grad);
    double norm = set_dh(1);
    const double negligible = norm * std::numeric_limits<C>::epsilon();
    for (int64_t step = steps;; --step) {
      const int64_t s = collected_count_++;
      const double* before = step > 1 ? history + (step - 2) * E() : nullptr;
      const bool done = 2 * static_cast<double>(step) * norm <= negligible;
      collect_columns(s, before, done);
      if (!before || done) {
        matrix_.each_block(0, [&](int64_t b, C*) { store(u(b, s), splat(C{1})); });
        break;
      }
      set_columns(before);
      take_step(s);
      norm = set_dh(-1);
      if (collected_count_ == kCollected) empty_collected();
    }
    write(grad);
  }

 private:
  // The largest number of steps whose vectors are stored.
  static constexpr int64_t kCollected = 32;

  struct OfColumn {
    C v, c;
  };

  const Group<T>& group() const { return matrix_.group(); }
  int64_t E() const { return matrix_.E(); }

  // The vectors of the stored step s, for the tokens of block b.
  C* a(int64_t b, int64_t s) const { return &collected_[2 * (s * slot_ + b) * W]; }
  C* u(int64_t b, int64_t s) const { return &collected_[(2 * (s * slot_ + b) + 1) * W]; }

  double log_scale(const double* h) const { return *std::max_element(h, h + E()); }

  void set_columns(const double* h) {
    log_scale_ = log_scale(h);
    for (int64_t e = 0; e < E(); ++e) v_[e] = static_cast<C>(std::exp(h[e] - log_scale_));
  }

  // Computes K, u and a of the last row update, and the column sums of K u (grad - df).
  void begin(const T* grad) {
    matrix_.sum_columns(kTogether * E(), [&](auto count, int64_t b, C* sums, C* tile) {
      Vec<C> rows[count], dots[count], u[count], df[count];
      for (int i = 0; i < count; ++i) {
        matrix_.fill_block(b + i);
        matrix_.pack(b + i, grad, C{0}, tile + i * E() * W);
        rows[i] = dots[i] = Vec<C>{};
      }
      for (int64_t e = 0; e < E(); ++e) {
        const Vec<C> v = splat(v_[e]);
        for (int i = 0; i < count; ++i) {
          const Vec<C> kv = matrix_.K(b + i, e) * v;
          rows[i] += kv;
          dots[i] = fma(kv, load(tile + (i * E() + e) * W), dots[i]);
        }
      }
      for (int i = 0; i < count; ++i) {
        u[i] = Matrix::inverse(rows[i]);
        df[i] = u[i] * dots[i];
        store(&u_[(b + i) * W], u[i]);
        store(a(b + i, 0), df[i] * u[i]);
      }
      for (int64_t e = 0; e < E(); ++e) {
        Vec<C> sum = load(sums + e * W);
        for (int i = 0; i < count; ++i) {
          sum = fma(u[i] * matrix_.K(b + i, e), load(tile + (i * E() + e) * W) - df[i], sum);
        }
        store(sums + e * W, sum);
      }
    });
  }

  // Computes dh from the column sums and returns its 1-norm. Adding a constant to h changes no
  // plan, so the exact sum of dh is 0. The mean of the computed dh is a rounding error that would
  // never decay. So the mean is subtracted.
  double set_dh(double sign) {
    for (int64_t e = 0; e < E(); ++e) dh_[e] = sign * v_[e] * matrix_.total()[e];
    const double mean = std::accumulate(dh_.begin(), dh_.end(), 0.0) / static_cast<double>(E());
    double norm = 0;
    for (double& d : dh_) norm += std::abs(d -= mean);
    return norm;
  }

  // Stores v and c of a step. `before` is h of the preceding iteration, or null for the first
  // iteration.
  void collect_columns(int64_t s, const double* before, bool done) {
    const double log_before = before ? log_scale(before) : -group().high * group().inverse_epsilon;
    const double factor = done ? 0 : std::exp(log_scale_ - log_before - group().log_marginal);
    for (int64_t e = 0; e < E(); ++e) {
      of_column_[s * E() + e] = {v_[e], static_cast<C>(dh_[e] * v_[e] * factor)};
    }
  }

  // Computes u and a of the preceding iteration, and the column sums of K a.
  void take_step(int64_t s) {
    matrix_.sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
      Vec<C> rows[count], dots[count], da[count];
      for (int i = 0; i < count; ++i) rows[i] = dots[i] = Vec<C>{};
      for (int64_t e = 0; e < E(); ++e) {
        const Vec<C> v = splat(v_[e]), c = splat(of_column_[s * E() + e].c);
        for (int i = 0; i < count; ++i) {
          const Vec<C> k = matrix_.load_ahead(matrix_.block(b + i) + e * W);
          rows[i] = fma(k, v, rows[i]);
          dots[i] = fma(k, c, dots[i]);
        }
      }
      for (int i = 0; i < count; ++i) {
        const Vec<C> before = Matrix::inverse(rows[i]);
        da[i] = -(before * dots[i]) * before;
        store(u(b + i, s), before);
        store(a(b + i, s + 1), da[i]);
      }
      matrix_.template add_columns<count>(b, da, sums);
    });
  }

  // Adds up the stored steps, to make room for further steps.
  void empty_collected() {
    taken_.make(matrix_.blocks() * E() * W);
    matrix_.each_block(0, [&](int64_t b, C*) {
      take_collected(b, &taken_[b * E() * W]);
      store(a(b, 0), load(a(b, kCollected)));
    });
    has_taken_ = true;
    collected_count_ = 0;
  }

  void write(const T* grad) {
    matrix_.each_block(2 * E(), [&](int64_t b, C* tile) {
      C* taken = has_taken_ ? &taken_[b * E() * W] : tile + E() * W;
      take_collected(b, taken);
      matrix_.pack(b, grad, C{0}, tile);
      const Vec<C> last_u = load(&u_[b * W]);
      for (int64_t e = 0; e < E(); ++e) {
        const Vec<C> direct = load(tile + e * W) * last_u * last_v_[e];
        store(
            tile + e * W,
            (direct - load(taken + e * W)) * matrix_.K(b, e) * matrix_.inverse_epsilon());
      }
      matrix_.unpack(b, tile);
    });
  }

  // taken[e] += sum over the stored steps of a v[e] + u c[e]. `taken` starts at 0. Loads a and u
  // once per four columns.
  void take_collected(int64_t b, C* taken) const {
    constexpr int64_t kColumns = 4;
    const auto add = [&](auto columns, int64_t e) {
      Vec<C> sum[columns];
      for (int i = 0; i < columns; ++i) {
        sum[i] = has_taken_ ? load(taken + (e + i) * W) : Vec<C>{};
      }
      for (int64_t s = 0; s < collected_count_; ++s) {
        const Vec<C> of_a = load(a(b, s)), of_u = load(u(b, s));
        for (int i = 0; i < columns; ++i) {
          const OfColumn& column = of_column_[s * E() + e + i];
          sum[i] = fma(of_a, splat(column.v), fma(of_u, splat(column.c), sum[i]));
        }
      }
      for (int i = 0; i < columns; ++i) store(taken + (e + i) * W, sum[i]);
    };
    int64_t e = 0;
    for (; e + kColumns <= E(); e += kColumns) add(std::integral_constant<int, kColumns>{}, e);
    for (; e < E(); ++e) add(std::integral_constant<int, 1>{}, e);
  }

  Matrix matrix_;
  int64_t slot_ = 0, collected_count_ = 0;
  bool has_taken_ = false;
  double log_scale_ = 0;
  Buffer<C> u_;      // [blocks, W]  of the last row update
  Buffer<C> taken_;  // [blocks, E, W]
  // [slots, blocks or one more, 2, W]. The system allocates only the pages that are touched.
  Buffer<C> collected_;
  std::vector<OfColumn> of_column_;  // [slots, E]
  std::vector<C> v_, last_v_;        // [E]
  std::vector<double> dh_;           // [E]
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
