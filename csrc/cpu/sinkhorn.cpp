#include "../sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// std::max ignores NaN; here it replaces the maximum and stays.
double max_or_nan(double high, double value) {
  return !(value <= high) && !std::isnan(high) ? value : high;
}

// What every domain knows of a group: M = logits / epsilon and how many tokens are there.
template <typename T>
struct Group {
  const T* logits;
  int64_t tokens;
  int64_t E;
  double inverse_epsilon;
  int64_t present = 0;              // tokens that are not absent
  double log_marginal;              // log(n / E)
  double high = -kInf, low = kInf;  // of the M that are not -inf; NaN stays
  bool complete = true;             // no -inf but in the rows of absent tokens

  Group(const T* logits_, int64_t tokens_, int64_t E_, double epsilon)
      : logits(logits_), tokens(tokens_), E(E_), inverse_epsilon(1 / epsilon) {
    if (!scan_finite()) scan();
    log_marginal = std::log(marginal());
  }

  double marginal() const { return static_cast<double>(present) / static_cast<double>(E); }
  double M(int64_t t, int64_t e) const { return logits[t * E + e] * inverse_epsilon; }

  // exp(M) and every product with a potential fit the format where the logits are no
  // further apart than this. Let S be that distance. Entries are shifted by their row's
  // largest, so they and the v / max v lie in [exp(-S), 1] (column sums of one u differ
  // by no more than the entries of a row do), products of the two in [exp(-2 S), 1], u
  // in [1/E, exp(S)]. Normal numbers end at exp(-87) in float32 and at exp(-708) in
  // float64. With forbidden pairs there may be no plan, and potentials grow with the
  // iterations.
  template <typename C>
  bool fits_scaling() const {
    constexpr double spread = sizeof(C) == sizeof(float) ? 40 : 200;
    return complete && high > -kInf && high - low <= spread;
  }

 private:
  // The ranges where every logit is finite; false, and nothing known, where one is not.
  bool scan_finite() {
    const int64_t size = tokens * E;
    constexpr T inf = std::numeric_limits<T>::infinity();
    if (size == 0) return false;
    Vec<T> top = splat(-inf), bottom = splat(inf);
    // -inf - -inf and inf - inf are NaN, as everything with NaN: it stays in the sum.
    Vec<T> poison{};
    const auto visit = [&](Vec<T> x) {
      top = x > top ? x : top;
      bottom = x < bottom ? x : bottom;
      poison += x - x;
    };
    int64_t i = 0;
    for (; i + kWidth<T> <= size; i += kWidth<T>) visit(load(logits + i));
    if (i < size) visit(load_some(logits + i, size - i, logits[0]));
    if (sum<T>(poison) != 0) return false;
    T highest[kWidth<T>], lowest[kWidth<T>];
    store(highest, top);
    store(lowest, bottom);
    high = *std::max_element(highest, highest + kWidth<T>) * inverse_epsilon;
    low = *std::min_element(lowest, lowest + kWidth<T>) * inverse_epsilon;
    present = tokens;
    return true;
  }

  void scan() {
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
  }
};

// The iteration on the potentials' logarithms: right for any logits, an exp for
// every entry and update.
template <typename T>
class LogDomain {
 public:
  explicit LogDomain(const Group<T>& group)
      : group_(group), f_(group.tokens, 0), h_(group.E, 0), high_(group.E), total_(group.E) {}

  // The updates of the iteration; each row update leaves the columns' sums behind.
  void start() { sum_columns(); }
  void step_columns() { update_columns(); }
  void step_rows() {
    update_rows();
    sum_columns();
  }

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
  void write_plan(T* plan) const {
    for (int64_t t = 0; t < group_.tokens; ++t) {
      for (int64_t e = 0; e < group_.E; ++e) {
        plan[t * group_.E + e] = static_cast<T>(weight(t, e));
      }
    }
  }
  void clear_rows() { std::fill(f_.begin(), f_.end(), 0); }
  void get_columns(double* h) const { std::copy(h_.begin(), h_.end(), h); }
  void set_columns(const double* h) { std::copy(h, h + group_.E, h_.begin()); }

 private:
  const Group<T>& group_;
  std::vector<double> f_, h_, high_, total_;
};

// One vector in memory, where it is aligned.
template <typename C>
struct alignas(kVectorBytes) Block {
  C lane[kWidth<C>];

  Vec<C> get() const { return load(lane); }
  void set(Vec<C> value) { store(lane, value); }
};

// width<double> values of C as doubles, and back.
template <typename C>
Vec<double> widen(const C* from) {
  if constexpr (std::is_same_v<C, double>) {
    return load(from);
  } else {
    typedef C Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half;
    memcpy(&half, from, sizeof(half));
    return __builtin_convertvector(half, Vec<double>);
  }
}

template <typename C>
void narrow(C* to, Vec<double> value) {
  if constexpr (std::is_same_v<C, double>) {
    store(to, value);
  } else {
    typedef C Half __attribute__((vector_size(kVectorBytes / 2)));
    const Half half = __builtin_convertvector(value, Half);
    memcpy(to, &half, sizeof(half));
  }
}

// The same on exp(M): an exp for every entry once, products after that, in numbers of
// type C. Where Group::fits_scaling<C>(). Kept between groups for its memory.
//
// K[t, e] = exp(M[t, e] - max_e M[t, e]), tokens in the lanes and absent ones left out: a
// row's sum is then an addition of vectors, every token has the same arithmetic wherever
// it stands, and E needs no padding. Lanes behind the last token have K = 0 and u = 0.
// The potentials are exp(f_t) = u_t exp(-max_e M[t, e] - log_scale) and
// exp(h_e) = v_e exp(log_scale), with max v = 1.
template <typename T, typename C>
class ScalingDomain {
  static constexpr int64_t W = kWidth<C>;
  using Blocks = std::vector<Block<C>>;

 public:
  void reset(const Group<T>& group) {
    group_ = &group;
    E_ = group.E;
    tokens_.clear();
    for (int64_t t = 0; t < group.tokens; ++t) {
      if (group.logits[t * E_] != -std::numeric_limits<T>::infinity()) tokens_.push_back(t);
    }
    blocks_ = (group.present + W - 1) / W;
    K_.resize(blocks_ * E_);
    u_.resize(blocks_);
    first_u_.resize(blocks_);
    tile_.resize(kTogether * E_);
    sums_.resize(E_);
    totals_.resize(E_ * kHalves);
    v_.resize(E_);
    total_.resize(E_);
    for (int64_t b = 0; b < blocks_; ++b) fill_block(b);
  }

  // Sums of the columns at f = 0.
  void start() {
    log_scale_ = -group_->high;
    sum_columns([&](auto count, int64_t b) {
      Vec<C> u[count];
      for (int i = 0; i < count; ++i) u[i] = first_u_[b + i].get();
      add_columns<count>(b, u);
    });
  }

  void step_columns() {
    const double least = *std::min_element(total_.begin(), total_.end());
    log_scale_ += group_->log_marginal - std::log(least);
    for (int64_t e = 0; e < E_; ++e) v_[e] = static_cast<C>(least / total_[e]);
  }

  // The row update and the sums that the next column update asks for, in one visit.
  void step_rows() {
    sum_columns([&](auto count, int64_t b) {
      Vec<C> u[count];
      sum_rows<count>(b, v_.data(), u);
      for (int i = 0; i < count; ++i) {
        u[i] = inverse(u[i]);
        u_[b + i].set(u[i]);
      }
      add_columns<count>(b, u);
    });
  }

  double ratio(int64_t e) const { return total_[e] * v_[e] / group_->marginal(); }

  void get_columns(double* h) const {
    for (int64_t e = 0; e < E_; ++e) h[e] = log_scale_ + std::log(static_cast<double>(v_[e]));
  }

  void write_plan(T* plan) {
    clear_absent(plan);
    for (int64_t b = 0; b < blocks_; ++b) {
      const Vec<C> u = u_[b].get();
      for (int64_t e = 0; e < E_; ++e) tile_[e].set(u * K(b, e) * v_[e]);
      unpack(b, plan);
    }
  }

  // The gradient of the iterations done (sinkhorn_backward says how). In P_i and Q_i only
  // the potentials change from step to step, so what a step takes from entry (t, e) is
  //   K[t, e] (a_i[t] v_i[e] + u_{i-1}[t] c_i[e]),   a_i = df_i u_i,  c_i = dh_i v_i / (n/E)
  // The vectors are collected and meet the matrix at the end; a step is one pass over K.
  void backward(const T* grad, const double* history, int64_t steps, T* out) {
    slots_ = std::min(steps, kCollected) + 1;
    collected_.resize(blocks_ * slots_);
    of_column_.resize(slots_ * E_);
    collected_count_ = 0;
    bool has_taken = false;
    std::vector<double> dh(E_);

    set_columns(history + (steps - 1) * E_);
    const std::vector<C> last_v = v_;
    sum_columns([&](auto count, int64_t b) {
      Vec<C> rows[count], dots[count], u[count], df[count];
      for (int i = 0; i < count; ++i) {
        pack(b + i, grad, tile_.data() + i * E_);
        rows[i] = dots[i] = Vec<C>{};
      }
      for (int64_t e = 0; e < E_; ++e) {
        const Vec<C> v = splat(v_[e]);
        for (int i = 0; i < count; ++i) {
          const Vec<C> kv = K(b + i, e) * v;
          rows[i] += kv;
          dots[i] = fma(kv, tile_[i * E_ + e].get(), dots[i]);
        }
      }
      for (int i = 0; i < count; ++i) {
        u[i] = inverse(rows[i]);
        df[i] = u[i] * dots[i];
        u_[b + i].set(u[i]);
        slot(b + i, 0).a.set(df[i] * u[i]);
      }
      for (int64_t e = 0; e < E_; ++e) {
        Vec<C> sum = sums_[e].get();
        for (int i = 0; i < count; ++i) {
          sum = fma(u[i] * K(b + i, e), tile_[i * E_ + e].get() - df[i], sum);
        }
        sums_[e].set(sum);
      }
    });
    for (int64_t e = 0; e < E_; ++e) dh[e] = v_[e] * total_[e];

    for (int64_t step = steps; step > 0; --step) {
      const int64_t s = collected_count_++;
      const double log_before = step > 1 ? log_scale(history + (step - 2) * E_) : -group_->high;
      const double factor = std::exp(log_scale_ - log_before - group_->log_marginal);
      for (int64_t e = 0; e < E_; ++e) {
        of_column_[s * E_ + e] = {v_[e], static_cast<C>(dh[e] * v_[e] * factor)};
      }
      if (step == 1) {
        for (int64_t b = 0; b < blocks_; ++b) slot(b, s).u = first_u_[b];
        break;
      }
      set_columns(history + (step - 2) * E_);
      sum_columns([&](auto count, int64_t b) {
        Vec<C> rows[count], dots[count], a[count];
        for (int i = 0; i < count; ++i) rows[i] = dots[i] = Vec<C>{};
        for (int64_t e = 0; e < E_; ++e) {
          const Vec<C> v = splat(v_[e]), c = splat(of_column_[s * E_ + e].c);
          for (int i = 0; i < count; ++i) {
            rows[i] = fma(K(b + i, e), v, rows[i]);
            dots[i] = fma(K(b + i, e), c, dots[i]);
          }
        }
        for (int i = 0; i < count; ++i) {
          const Vec<C> u = inverse(rows[i]);
          a[i] = -(u * dots[i]) * u;
          slot(b + i, s).u.set(u);
          slot(b + i, s + 1).a.set(a[i]);
        }
        add_columns<count>(b, a);
      });
      for (int64_t e = 0; e < E_; ++e) dh[e] = -v_[e] * total_[e];
      if (collected_count_ == kCollected) {
        taken_.resize(blocks_ * E_);
        for (int64_t b = 0; b < blocks_; ++b) {
          take_collected(b, has_taken, taken_.data() + b * E_);
          slot(b, 0) = slot(b, kCollected);
        }
        has_taken = true;
        collected_count_ = 0;
      }
    }

    clear_absent(out);
    const C scale = static_cast<C>(group_->inverse_epsilon);
    for (int64_t b = 0; b < blocks_; ++b) {
      Block<C>* taken = has_taken ? taken_.data() + b * E_ : tile_.data() + E_;
      take_collected(b, has_taken, taken);
      pack(b, grad, tile_.data());
      const Vec<C> u = u_[b].get();
      for (int64_t e = 0; e < E_; ++e) {
        const Vec<C> direct = tile_[e].get() * u * last_v[e];
        tile_[e].set((direct - taken[e].get()) * K(b, e) * scale);
      }
      unpack(b, out);
    }
  }

 private:
  // Blocks that a pass takes together, to keep several sums going and to load and store
  // the columns' less often.
  static constexpr int64_t kTogether = 4;
  // Blocks whose columns are summed in C before the sum goes on in float64.
  static constexpr int64_t kPartial = 32;
  // Steps of the backward whose vectors are collected.
  static constexpr int64_t kCollected = 32;
  static constexpr int64_t kHalves = W / kWidth<double>;

  struct OfToken {
    Block<C> a, u;
  };
  struct OfColumn {
    C v, c;
  };

  Vec<C> K(int64_t b, int64_t e) const { return K_[b * E_ + e].get(); }
  OfToken& slot(int64_t b, int64_t s) { return collected_[b * slots_ + s]; }
  int64_t count(int64_t b) const { return std::min(W, group_->present - b * W); }

  static Vec<C> inverse(Vec<C> x) { return x > Vec<C>{} ? C{1} / x : Vec<C>{}; }

  // tile[e] = entry e of the block's tokens; zeros behind the last.
  void pack(int64_t b, const T* from, Block<C>* tile) const {
    const int64_t* token = tokens_.data() + b * W;
    const int64_t there = count(b);
    int64_t e = 0;
    if constexpr (std::is_same_v<T, C>) {
      for (; there == W && e + W <= E_; e += W) {
        Vec<C> square[W];
        for (int64_t i = 0; i < W; ++i) square[i] = load(from + token[i] * E_ + e);
        transpose<C>(square);
        for (int64_t i = 0; i < W; ++i) tile[e + i].set(square[i]);
      }
    }
    for (; e < E_; ++e) {
      for (int64_t i = 0; i < W; ++i) {
        tile[e].lane[i] = i < there ? static_cast<C>(from[token[i] * E_ + e]) : C{0};
      }
    }
  }

  // The reverse, from tile_.
  void unpack(int64_t b, T* to) {
    const int64_t* token = tokens_.data() + b * W;
    const int64_t there = count(b);
    int64_t e = 0;
    if constexpr (std::is_same_v<T, C>) {
      for (; there == W && e + W <= E_; e += W) {
        Vec<C> square[W];
        for (int64_t i = 0; i < W; ++i) square[i] = tile_[e + i].get();
        transpose<C>(square);
        for (int64_t i = 0; i < W; ++i) store(to + token[i] * E_ + e, square[i]);
      }
    }
    for (; e < E_; ++e) {
      for (int64_t i = 0; i < there; ++i) to[token[i] * E_ + e] = static_cast<T>(tile_[e].lane[i]);
    }
  }

  void clear_absent(T* to) const {
    if (group_->present < group_->tokens) std::fill(to, to + group_->tokens * E_, T{0});
  }

  // K and first_u = exp(max_e M - high), the row potentials' start. The exponents are
  // float64: a float32 one of 40 would be off by 2e-6. What it lacks is multiplied in.
  void fill_block(int64_t b) {
    Block<C>* K = K_.data() + b * E_;
    pack(b, group_->logits, tile_.data());
    Vec<C> top = tile_[0].get();
    for (int64_t e = 1; e < E_; ++e) top = max<C>(top, tile_[e].get());
    Block<C> high;
    high.set(top);
    for (int64_t half = 0; half < W; half += kWidth<double>) {
      const Vec<double> shift = widen(high.lane + half) * group_->inverse_epsilon;
      narrow(first_u_[b].lane + half, exp(shift - group_->high));
      for (int64_t e = 0; e < E_; ++e) {
        C* at = K[e].lane + half;
        C* rest = tile_[e].lane + half;
        const Vec<double> m = widen(rest) * group_->inverse_epsilon - shift;
        narrow(at, m);
        if constexpr (!std::is_same_v<C, double>) narrow(rest, m - widen(at));
      }
    }
    for (int64_t e = 0; e < E_; ++e) {
      const Vec<C> power = exp(K[e].get());
      K[e].set(std::is_same_v<C, double> ? power : fma(power, tile_[e].get(), power));
    }
    for (int64_t i = count(b); i < W; ++i) {
      first_u_[b].lane[i] = 0;
      for (int64_t e = 0; e < E_; ++e) K[e].lane[i] = 0;
    }
  }

  double log_scale(const double* h) const { return *std::max_element(h, h + E_); }

  void set_columns(const double* h) {
    log_scale_ = log_scale(h);
    for (int64_t e = 0; e < E_; ++e) v_[e] = static_cast<C>(std::exp(h[e] - log_scale_));
  }

  // sum[i] = sum_e K[t, e] v[e] for the tokens t of block b + i.
  template <int kCount>
  void sum_rows(int64_t b, const C* v, Vec<C>* sum) const {
    for (int i = 0; i < kCount; ++i) sum[i] = Vec<C>{};
    for (int64_t e = 0; e < E_; ++e) {
      const Vec<C> factor = splat(v[e]);
      for (int i = 0; i < kCount; ++i) sum[i] = fma(K(b + i, e), factor, sum[i]);
    }
  }

  // sums[e] += K[t, e] u[t] of these blocks.
  template <int kCount>
  void add_columns(int64_t b, const Vec<C>* u) {
    for (int64_t e = 0; e < E_; ++e) {
      Vec<C> sum = sums_[e].get();
      for (int i = 0; i < kCount; ++i) sum = fma(K(b + i, e), u[i], sum);
      sums_[e].set(sum);
    }
  }

  // Calls visit(count, block) for all blocks; what it adds to sums_ ends up in total_.
  template <typename Visit>
  void sum_columns(Visit&& visit) {
    std::fill(totals_.begin(), totals_.end(), Block<double>{});
    for (int64_t b = 0; b < blocks_;) {
      std::fill(sums_.begin(), sums_.end(), Block<C>{});
      const int64_t end = std::min(b + kPartial, blocks_);
      for (; b + kTogether <= end; b += kTogether) {
        visit(std::integral_constant<int, kTogether>{}, b);
      }
      for (; b < end; ++b) visit(std::integral_constant<int, 1>{}, b);
      for (int64_t e = 0; e < E_; ++e) {
        for (int64_t half = 0; half < kHalves; ++half) {
          Block<double>& total = totals_[e * kHalves + half];
          total.set(total.get() + widen(sums_[e].lane + half * kWidth<double>));
        }
      }
    }
    for (int64_t e = 0; e < E_; ++e) {
      total_[e] = 0;
      for (int64_t half = 0; half < kHalves; ++half) {
        total_[e] += sum<double>(totals_[e * kHalves + half].get());
      }
    }
  }

  // taken[e] (from 0, or going on) + sum over the collected steps of a v[e] + u c[e], four
  // columns for every load of a and u.
  void take_collected(int64_t b, bool go_on, Block<C>* taken) {
    constexpr int64_t kColumns = 4;
    const auto add = [&](auto columns, int64_t e) {
      Vec<C> sum[columns];
      for (int i = 0; i < columns; ++i) sum[i] = go_on ? taken[e + i].get() : Vec<C>{};
      for (int64_t s = 0; s < collected_count_; ++s) {
        const Vec<C> a = slot(b, s).a.get(), u = slot(b, s).u.get();
        for (int i = 0; i < columns; ++i) {
          const OfColumn& column = of_column_[s * E_ + e + i];
          sum[i] = fma(a, splat(column.v), fma(u, splat(column.c), sum[i]));
        }
      }
      for (int i = 0; i < columns; ++i) taken[e + i].set(sum[i]);
    };
    int64_t e = 0;
    for (; e + kColumns <= E_; e += kColumns) add(std::integral_constant<int, kColumns>{}, e);
    for (; e < E_; ++e) add(std::integral_constant<int, 1>{}, e);
  }

  const Group<T>* group_ = nullptr;
  int64_t E_ = 0, blocks_ = 0, slots_ = 0, collected_count_ = 0;
  double log_scale_ = 0;
  std::vector<int64_t> tokens_;  // that are there
  Blocks K_;                     // [blocks, E]
  Blocks u_, first_u_;           // [blocks]
  Blocks tile_;                  // [kTogether, E] scratch
  Blocks sums_;                  // [E]
  Blocks taken_;                 // [blocks, E]
  std::vector<Block<double>> totals_;
  std::vector<OfToken> collected_;   // [blocks, slots]
  std::vector<OfColumn> of_column_;  // [slots, E]
  std::vector<C> v_;
  std::vector<double> total_;
};

// max_e |column sum / (n/E) - 1|; NaN stays.
template <typename Domain>
double column_error(const Domain& domain, int64_t E, double log_marginal) {
  if (log_marginal == -kInf) return 0;  // nobody is there
  double worst = 0;
  for (int64_t e = 0; e < E; ++e) worst = max_or_nan(worst, std::abs(domain.ratio(e) - 1));
  return worst;
}

template <typename T>
struct Outputs {
  T* plan;
  double* history;
  double* error;
  int32_t* steps;
};

// The forward of one group, in any domain.
template <typename T, typename Domain>
void iterate(
    Domain& domain, const Group<T>& group, int64_t iterations, double tolerance,
    const Outputs<T>& out) {
  domain.start();
  int64_t step = 0;
  for (; step < iterations; ++step) {
    if (tolerance > 0 && step > 0 &&
        column_error(domain, group.E, group.log_marginal) <= tolerance) {
      break;
    }
    domain.step_columns();
    domain.step_rows();
    domain.get_columns(out.history + step * group.E);
  }
  *out.steps = static_cast<int32_t>(step);
  *out.error = column_error(domain, group.E, group.log_marginal);
  domain.write_plan(out.plan);
}

// The backward of one group on logarithms, an exp for every entry and update.
template <typename T>
void backward_by_logs(
    const Group<T>& group, const T* grad, const double* history, int64_t step, T* grad_logits) {
  const int64_t tokens = group.tokens, E = group.E;
  const double inverse_marginal = group.log_marginal == -kInf ? 0 : std::exp(-group.log_marginal);
  std::vector<double> out(tokens * E), df(tokens), dh(E, 0);
  LogDomain<T> domain(group);
  const auto use_columns = [&](int64_t i) { domain.set_columns(history + (i - 1) * E); };
  if (step > 0) {
    use_columns(step);
    domain.update_rows();
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t e = 0; e < E; ++e) {
      const double d = grad[t * E + e] * domain.weight(t, e);
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
  for (int64_t i = 0; i < tokens * E; ++i) {
    grad_logits[i] = static_cast<T>(out[i] * group.inverse_epsilon);
  }
}

}  // namespace

template <typename T>
void sinkhorn(
    const T* logits, T* plan, double* history, double* error, int32_t* steps, int64_t tokens,
    int64_t E, int64_t iterations, double epsilon, double tolerance, int64_t group_begin,
    int64_t group_end) {
  // Rounding of float32 sums alone is an error of about 1e-7: an aim near it needs float64.
  const bool narrow_will_do = !(tolerance > 0 && tolerance < 1e-4);
  ScalingDomain<T, T> scaling;
  ScalingDomain<T, double> wide;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const Group<T> group(logits + g * tokens * E, tokens, E, epsilon);
    const Outputs<T> out{plan + g * tokens * E, history + g * iterations * E, error + g, steps + g};
    std::fill(out.history, out.history + iterations * E, 0);
    if (narrow_will_do && group.template fits_scaling<T>()) {
      scaling.reset(group);
      iterate(scaling, group, iterations, tolerance, out);
    } else if (group.template fits_scaling<double>()) {
      wide.reset(group);
      iterate(wide, group, iterations, tolerance, out);
    } else {
      LogDomain<T> logarithms(group);
      iterate(logarithms, group, iterations, tolerance, out);
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
  ScalingDomain<T, T> scaling;
  ScalingDomain<T, double> wide;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t at = g * tokens * E;
    const Group<T> group(logits + at, tokens, E, epsilon);
    const double* kept = history + g * iterations * E;
    if (steps[g] > 0 && group.template fits_scaling<T>()) {
      scaling.reset(group);
      scaling.backward(grad + at, kept, steps[g], grad_logits + at);
    } else if (steps[g] > 0 && group.template fits_scaling<double>()) {
      wide.reset(group);
      wide.backward(grad + at, kept, steps[g], grad_logits + at);
    } else {
      backward_by_logs(group, grad + at, kept, steps[g], grad_logits + at);
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
