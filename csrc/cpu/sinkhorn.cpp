#include "../sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
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

// Tokens of a piece: whatever is summed over the tokens of a group is summed over those of
// a piece first, one thread a piece, and then over the pieces.
constexpr int64_t kPiece = 512;

// The fewest pieces that are worth a thread: those of 64k entries, some us of work.
int64_t grain(int64_t E) {
  return std::max<int64_t>(1, 65536 / (kPiece * std::max<int64_t>(1, E)));
}

// What every domain knows of a group: M = logits / epsilon and how many tokens are there.
template <typename T>
struct Group {
  const T* logits;
  int64_t tokens;
  int64_t E;
  double inverse_epsilon;
  int64_t pieces;
  const Parallel& parallel;
  int64_t present = 0;              // tokens that are not absent
  double log_marginal;              // log(n / E)
  double high = -kInf, low = kInf;  // of the logits that are not -inf; NaN stays
  bool complete = true;             // no -inf but in the rows of absent tokens

  Group(const T* logits_, int64_t tokens_, int64_t E_, double epsilon, const Parallel& parallel_)
      : logits(logits_),
        tokens(tokens_),
        E(E_),
        inverse_epsilon(1 / epsilon),
        pieces((tokens + kPiece - 1) / kPiece),
        parallel(parallel_) {
    std::vector<Range> ranges(pieces);
    each_piece([&](int64_t piece, int64_t begin, int64_t end) {
      if (!scan_finite(begin, end, ranges[piece])) scan(begin, end, ranges[piece]);
    });
    for (const Range& range : ranges) {
      present += range.present;
      high = max_or_nan(high, range.high);
      low = std::min(low, range.low);
      complete = complete && range.complete;
    }
    log_marginal = std::log(marginal());
  }

  // Calls body(piece, begin, end) for all pieces, tokens [begin, end).
  template <typename Body>
  void each_piece(Body&& body) const {
    parallel(pieces, grain(E), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        body(i, i * kPiece, std::min((i + 1) * kPiece, tokens));
      }
    });
  }

  double marginal() const { return static_cast<double>(present) / static_cast<double>(E); }
  double M(int64_t t, int64_t e) const { return logits[t * E + e] * inverse_epsilon; }

  // exp(M) and every product with a potential fit the format where the M are no
  // further apart than this. Let S be that distance. Entries are shifted by their row's
  // largest, so they and the v / max v lie in [exp(-S), 1] (column sums of one u differ
  // by no more than the entries of a row do), products of the two in [exp(-2 S), 1], u
  // in [1/E, exp(S)]. Normal numbers end at exp(-87) in float32 and at exp(-708) in
  // float64. With forbidden pairs there may be no plan, and potentials grow with the
  // iterations.
  template <typename C>
  bool fits_scaling() const {
    constexpr double spread = sizeof(C) == sizeof(float) ? 40 : 200;
    return complete && high > -kInf && (high - low) * inverse_epsilon <= spread;
  }

 private:
  struct Range {
    int64_t present = 0;
    double high = -kInf, low = kInf;
    bool complete = true;
  };

  // Of a piece where every logit is finite; false, and nothing known, where one is not.
  bool scan_finite(int64_t begin, int64_t end, Range& range) const {
    const T* from = logits + begin * E;
    const int64_t size = (end - begin) * E;
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
    for (; i + kWidth<T> <= size; i += kWidth<T>) visit(load(from + i));
    if (i < size) visit(load_some(from + i, size - i, from[0]));
    if (sum<T>(poison) != 0) return false;
    T highest[kWidth<T>], lowest[kWidth<T>];
    store(highest, top);
    store(lowest, bottom);
    range.high = *std::max_element(highest, highest + kWidth<T>);
    range.low = *std::min_element(lowest, lowest + kWidth<T>);
    range.present = end - begin;
    return true;
  }

  void scan(int64_t begin, int64_t end, Range& range) const {
    for (int64_t t = begin; t < end; ++t) {
      int64_t reachable = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double x = logits[t * E + e];
        if (x == -kInf) continue;
        ++reachable;
        range.high = max_or_nan(range.high, x);
        range.low = std::min(range.low, x);
      }
      range.present += reachable > 0;
      range.complete = range.complete && (reachable == 0 || reachable == E);
    }
  }
};

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
  void step_columns() { update_columns(); }
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

  void update_columns() {
    for (int64_t e = 0; e < group_.E; ++e) {
      h_[e] = total_[e] == -kInf ? -kInf : group_.log_marginal - total_[e];
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
      double* partial = &partial_[piece * group_.E];
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

// One vector in memory, where it is aligned.
template <typename C>
struct alignas(kVectorBytes) Block {
  C lane[kWidth<C>];
};

// Memory that is kept from group to group, and holds no values at first.
template <typename Item>
class Room {
 public:
  void make(int64_t size) {
    if (size <= size_) return;
    items_.reset(new Item[size]);
    size_ = size;
  }
  Item* get() const { return items_.get(); }

 private:
  std::unique_ptr<Item[]> items_;
  int64_t size_ = 0;
};

template <typename C>
class Vectors {
 public:
  void make(int64_t count) { room_.make(count); }
  C* operator[](int64_t i) const { return room_.get()[i].lane; }

 private:
  Room<Block<C>> room_;
};

// width<double> values of C as doubles.
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

// The same on exp(M): an exp for every entry once, products after that, in numbers of
// type C. Where Group::fits_scaling<C>(). Kept between groups for its memory.
//
// K[t, e] = exp(M[t, e] - max_e M[t, e]), a vector of tokens a block: a row's sum is then
// an addition of vectors, every token has the same arithmetic wherever it stands, and E
// needs no padding. An absent token, and a lane behind the last, has K = 0 and u = 0.
// The potentials are exp(f_t) = u_t exp(-max_e M[t, e] - log_scale) and
// exp(h_e) = v_e exp(log_scale), with max v = 1.
//
// A block of K is as large as its rows of the output, where C is T: it lies there until
// they are written, and an iteration's memory is the output's.
template <typename T, typename C>
class ScalingDomain {
  static constexpr int64_t W = kWidth<C>;

 public:
  void reset(const Group<T>& group, T* out) {
    group_ = &group;
    out_ = out;
    E_ = group.E;
    blocks_ = (group.tokens + W - 1) / W;
    in_place_ = std::is_same_v<T, C> ? group.tokens / W : 0;
    own_.make((blocks_ - in_place_) * E_);
    u_.make(blocks_);
    first_u_.make(blocks_);
    partial_.make(group.pieces * ((E_ + kWidth<double> - 1) / kWidth<double>));
    v_.assign(E_ + kWidth<double>, 0);
    total_.resize(E_ + kWidth<double>);
    const double inverse = group.inverse_epsilon;
    inverse_ = static_cast<C>(inverse);
    inverse_rest_ = static_cast<C>(inverse - static_cast<double>(inverse_));
  }

  // K, and the sums of the columns at f = 0.
  void start() {
    log_scale_ = -group_->high * group_->inverse_epsilon;
    sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
      Vec<C> u[count];
      for (int i = 0; i < count; ++i) {
        fill_block(b + i);
        u[i] = load(first_u_[b + i]);
      }
      add_columns<count>(b, u, sums);
    });
  }

  void step_columns() {
    const double least = *std::min_element(total_.begin(), total_.begin() + E_);
    log_scale_ += group_->log_marginal - std::log(least);
    for (int64_t e = 0; e < E_; ++e) v_[e] = static_cast<C>(least / total_[e]);
  }

  // The row update and the sums that the next column update asks for, in one pass; the
  // plan too, where this is the last. The sums of some rows and the columns' part of the
  // rows before go together: neither waits for the other, and the latter are still near.
  void step_rows(bool last) {
    sum_pieces(last ? E_ : 0, [&](int64_t begin, int64_t end, C* sums, C* tile) {
      Vec<C> before[kTogether];
      int64_t count = 0;
      const auto add_before = [&](auto next, int64_t b, Vec<C>* rows) {
        count == kTogether ? visit<kTogether, next>(b, before, rows, sums)
        : count > 0        ? visit<1, next>(b, before, rows, sums)
                           : visit<0, next>(b, before, rows, sums);
        for (int64_t i = b - count; i < b; ++i) {
          const Vec<C> u = before[i - (b - count)];
          last ? write_block(i, u, tile) : store(u_[i], u);
        }
        count = next;
        for (int i = 0; i < next; ++i) before[i] = inverse(rows[i]);
      };
      Vec<C> rows[kTogether];
      each_few(begin, end, [&](auto next, int64_t b) { add_before(next, b, rows); });
      add_before(std::integral_constant<int, 0>{}, end, rows);
    });
  }

  double ratio(int64_t e) const { return total_[e] * v_[e] / group_->marginal(); }

  void get_columns(double* h) const {
    for (int64_t e = 0; e < E_; e += kWidth<double>) {
      const Vec<double> value = log_scale_ + log(widen(&v_[e]));
      const int64_t width = E_ - e;
      width < kWidth<double> ? store_some(h + e, value, width) : store(h + e, value);
    }
  }

  void write_plan() {
    each_block(E_, [&](int64_t b, C* tile) { write_block(b, load(u_[b]), tile); });
  }

  // The gradient of the iterations done (sinkhorn_backward says how). In P_i and Q_i only
  // the potentials change from step to step, so what a step takes from entry (t, e) is
  //   K[t, e] (a_i[t] v_i[e] + u_{i-1}[t] c_i[e]),   a_i = df_i u_i,  c_i = dh_i v_i / (n/E)
  // The vectors are collected and meet the matrix at the end; a step is one pass over K.
  void backward(const T* grad, const double* history, int64_t steps) {
    slots_ = std::min(steps, kCollected) + 1;
    collected_.make(2 * blocks_ * slots_);
    of_column_.resize(slots_ * E_);
    collected_count_ = 0;
    bool has_taken = false;
    std::vector<double> dh(E_);

    set_columns(history + (steps - 1) * E_);
    const std::vector<C> last_v = v_;
    sum_columns(kTogether * E_, [&](auto count, int64_t b, C* sums, C* tile) {
      Vec<C> rows[count], dots[count], u[count], df[count];
      for (int i = 0; i < count; ++i) {
        fill_block(b + i);
        pack(b + i, grad, C{0}, tile + i * E_ * W);
        rows[i] = dots[i] = Vec<C>{};
      }
      for (int64_t e = 0; e < E_; ++e) {
        const Vec<C> v = splat(v_[e]);
        for (int i = 0; i < count; ++i) {
          const Vec<C> kv = K(b + i, e) * v;
          rows[i] += kv;
          dots[i] = fma(kv, load(tile + (i * E_ + e) * W), dots[i]);
        }
      }
      for (int i = 0; i < count; ++i) {
        u[i] = inverse(rows[i]);
        df[i] = u[i] * dots[i];
        store(u_[b + i], u[i]);
        store(a(b + i, 0), df[i] * u[i]);
      }
      for (int64_t e = 0; e < E_; ++e) {
        Vec<C> sum = load(sums + e * W);
        for (int i = 0; i < count; ++i) {
          sum = fma(u[i] * K(b + i, e), load(tile + (i * E_ + e) * W) - df[i], sum);
        }
        store(sums + e * W, sum);
      }
    });
    for (int64_t e = 0; e < E_; ++e) dh[e] = v_[e] * total_[e];

    const double first_scale = -group_->high * group_->inverse_epsilon;
    for (int64_t step = steps; step > 0; --step) {
      const int64_t s = collected_count_++;
      const double log_before = step > 1 ? log_scale(history + (step - 2) * E_) : first_scale;
      const double factor = std::exp(log_scale_ - log_before - group_->log_marginal);
      for (int64_t e = 0; e < E_; ++e) {
        of_column_[s * E_ + e] = {v_[e], static_cast<C>(dh[e] * v_[e] * factor)};
      }
      if (step == 1) {
        each_block(0, [&](int64_t b, C*) { store(u(b, s), load(first_u_[b])); });
        break;
      }
      set_columns(history + (step - 2) * E_);
      sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
        Vec<C> rows[count], dots[count], da[count];
        for (int i = 0; i < count; ++i) rows[i] = dots[i] = Vec<C>{};
        for (int64_t e = 0; e < E_; ++e) {
          const Vec<C> v = splat(v_[e]), c = splat(of_column_[s * E_ + e].c);
          for (int i = 0; i < count; ++i) {
            rows[i] = fma(K(b + i, e), v, rows[i]);
            dots[i] = fma(K(b + i, e), c, dots[i]);
          }
        }
        for (int i = 0; i < count; ++i) {
          const Vec<C> before = inverse(rows[i]);
          da[i] = -(before * dots[i]) * before;
          store(u(b + i, s), before);
          store(a(b + i, s + 1), da[i]);
        }
        add_columns<count>(b, da, sums);
      });
      for (int64_t e = 0; e < E_; ++e) dh[e] = -v_[e] * total_[e];
      if (collected_count_ == kCollected) {
        taken_.make(blocks_ * E_);
        each_block(0, [&](int64_t b, C*) {
          take_collected(b, has_taken, taken_[b * E_]);
          store(a(b, 0), load(a(b, kCollected)));
        });
        has_taken = true;
        collected_count_ = 0;
      }
    }

    each_block(2 * E_, [&](int64_t b, C* tile) {
      C* taken = has_taken ? taken_[b * E_] : tile + E_ * W;
      take_collected(b, has_taken, taken);
      pack(b, grad, C{0}, tile);
      const Vec<C> last_u = load(u_[b]);
      for (int64_t e = 0; e < E_; ++e) {
        const Vec<C> direct = load(tile + e * W) * last_u * last_v[e];
        store(tile + e * W, (direct - load(taken + e * W)) * K(b, e) * inverse_);
      }
      unpack(b, tile);
    });
  }

 private:
  // Blocks that a pass takes together, to keep several sums going and to load and store
  // the columns' less often.
  static constexpr int64_t kTogether = 4;
  // Steps of the backward whose vectors are collected.
  static constexpr int64_t kCollected = 32;

  struct OfColumn {
    C v, c;
  };

  C* block(int64_t b) const {
    if constexpr (std::is_same_v<T, C>) {
      if (b < in_place_) return out_ + b * E_ * W;
    }
    return own_[(b - in_place_) * E_];
  }
  Vec<C> K(int64_t b, int64_t e) const { return load(block(b) + e * W); }
  // What the backward collects of a block's tokens.
  C* a(int64_t b, int64_t s) const { return collected_[2 * (b * slots_ + s)]; }
  C* u(int64_t b, int64_t s) const { return collected_[2 * (b * slots_ + s) + 1]; }
  int64_t count(int64_t b) const { return std::min(W, group_->tokens - b * W); }

  // A row's entries, `width` of them.
  static Vec<C> load_row(const T* from, int64_t width) {
    if constexpr (std::is_same_v<T, C>) {
      return width == W ? load(from) : load_some(from, width, C{0});
    } else {
      Vec<C> row{};
      for (int64_t i = 0; i < width; ++i) row[i] = from[i];
      return row;
    }
  }

  static void store_row(T* to, Vec<C> row, int64_t width) {
    if constexpr (std::is_same_v<T, C>) {
      width == W ? store(to, row) : store_some(to, row, width);
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = static_cast<T>(row[i]);
    }
  }

  static Vec<C> inverse(Vec<C> x) { return x > Vec<C>{} ? C{1} / x : Vec<C>{}; }

  // tile[e] = entry e of the block's tokens; `nobody` behind the last.
  void pack(int64_t b, const T* from, C nobody, C* tile) const {
    const T* rows = from + b * W * E_;
    const int64_t there = count(b);
    for (int64_t e = 0; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      Vec<C> square[W];
      for (int64_t i = 0; i < W; ++i)
        square[i] = i < there ? load_row(rows + i * E_ + e, width) : splat(nobody);
      transpose<C>(square);
      for (int64_t i = 0; i < width; ++i) store(tile + (e + i) * W, square[i]);
    }
  }

  // The reverse, to the output.
  void unpack(int64_t b, const C* tile) const {
    T* rows = out_ + b * W * E_;
    const int64_t there = count(b);
    for (int64_t e = 0; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      Vec<C> square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = load(tile + std::min(e + i, E_ - 1) * W);
      transpose<C>(square);
      for (int64_t i = 0; i < there; ++i) store_row(rows + i * E_ + e, square[i], width);
    }
  }

  // exp((x - from) / epsilon). In float32 the exponent would be off by 2e-6 at 40: what it
  // lacks is multiplied in.
  Vec<C> power(Vec<C> x, Vec<C> from) const {
    const Vec<C> difference = x - from;
    const Vec<C> exponent = difference * inverse_;
    if constexpr (std::is_same_v<C, double>) {
      return exp(exponent);
    } else {
      const Vec<C> back = difference - x;
      const Vec<C> lost = (x - (difference - back)) - (from + back);
      const Vec<C> inverse = splat(inverse_);
      const Vec<C> rest = fma(lost, inverse, difference * inverse_rest_) +
                          product_error(difference, inverse, exponent);
      const Vec<C> rounded = exp(exponent);
      return fma(rounded, rest, rounded);
    }
  }

  // K and first_u = exp(max_e M - high), the row potentials' start.
  void fill_block(int64_t b) const {
    C* K = block(b);
    pack(b, group_->logits, -std::numeric_limits<C>::infinity(), K);
    Vec<C> top = load(K);
    for (int64_t e = 1; e < E_; ++e) top = max<C>(top, load(K + e * W));
    const Mask<C> there = top >= static_cast<C>(group_->low);
    for (int64_t e = 0; e < E_; ++e) {
      store(K + e * W, there ? power(load(K + e * W), top) : Vec<C>{});
    }
    store(first_u_[b], there ? power(top, splat(static_cast<C>(group_->high))) : Vec<C>{});
  }

  void write_block(int64_t b, Vec<C> u, C* tile) const {
    for (int64_t e = 0; e < E_; ++e) store(tile + e * W, u * K(b, e) * v_[e]);
    unpack(b, tile);
  }

  double log_scale(const double* h) const { return *std::max_element(h, h + E_); }

  void set_columns(const double* h) {
    log_scale_ = log_scale(h);
    for (int64_t e = 0; e < E_; ++e) v_[e] = static_cast<C>(std::exp(h[e] - log_scale_));
  }

  // rows[i] = sum_e K[t, e] v[e] for the tokens t of block b + i, i < kRows, and
  // sums[e] += K[t, e] u[t] of the kColumns blocks before b.
  template <int kColumns, int kRows>
  void visit(int64_t b, const Vec<C>* u, Vec<C>* rows, C* sums) const {
    const C *of_rows[kRows + 1], *of_columns[kColumns + 1];
    Vec<C> row[kRows + 1], factor[kColumns + 1];
    for (int i = 0; i < kRows; ++i) {
      of_rows[i] = block(b + i);
      row[i] = Vec<C>{};
    }
    for (int i = 0; i < kColumns; ++i) {
      of_columns[i] = block(b - kColumns + i);
      factor[i] = u[i];
    }
    const C* v = v_.data();
    const int64_t E = E_;
    for (int64_t e = 0; e < E; ++e) {
      if constexpr (kRows > 0) {
        const Vec<C> of_column = splat(v[e]);
        for (int i = 0; i < kRows; ++i) {
          row[i] = fma(load(of_rows[i] + e * W), of_column, row[i]);
        }
      }
      if constexpr (kColumns > 0) {
        Vec<C> sum = load(sums + e * W);
        for (int i = 0; i < kColumns; ++i) {
          sum = fma(load(of_columns[i] + e * W), factor[i], sum);
        }
        store(sums + e * W, sum);
      }
    }
    for (int i = 0; i < kRows; ++i) rows[i] = row[i];
  }

  // sums[e] += K[t, e] u[t] of these blocks.
  template <int kCount>
  void add_columns(int64_t b, const Vec<C>* u, C* sums) const {
    visit<kCount, 0>(b + kCount, u, nullptr, sums);
  }

  // Calls body(count, block) for the blocks [begin, end), some at a time.
  template <typename Body>
  static void each_few(int64_t begin, int64_t end, Body&& body) {
    int64_t b = begin;
    for (; b + kTogether <= end; b += kTogether) {
      body(std::integral_constant<int, kTogether>{}, b);
    }
    for (; b < end; ++b) body(std::integral_constant<int, 1>{}, b);
  }

  // Calls visit(block, scratch) for all blocks.
  template <typename Visit>
  void each_block(int64_t scratch_vectors, Visit&& visit) const {
    const int64_t at_least = grain(E_) * kPiece / W;
    group_->parallel(blocks_, at_least, [&](int64_t begin, int64_t end) {
      Vectors<C> scratch;
      scratch.make(scratch_vectors);
      for (int64_t b = begin; b < end; ++b) visit(b, scratch[0]);
    });
  }

  // Calls body(begin, end, sums, scratch) for the blocks of every piece; what it adds to
  // the sums [E] ends up in total_, added in C within a piece and in float64 from there.
  template <typename Body>
  void sum_pieces(int64_t scratch_vectors, Body&& body) {
    constexpr int64_t kWide = kWidth<double>, kBlocks = kPiece / W;
    const int64_t stride = (E_ + kWide - 1) / kWide * kWide;
    const int64_t room = E_ + scratch_vectors;
    room_.make((group_->pieces / grain(E_) + 1) * room);
    group_->parallel(group_->pieces, grain(E_), [&](int64_t first, int64_t last) {
      // No range but this one begins between two multiples of the grain.
      C* sums = room_[first / grain(E_) * room];
      for (int64_t piece = first; piece < last; ++piece) {
        for (int64_t e = 0; e < E_; ++e) store(sums + e * W, Vec<C>{});
        body(piece * kBlocks, std::min((piece + 1) * kBlocks, blocks_), sums, sums + E_ * W);
        for (int64_t e = 0; e < E_; e += kWide) {
          Vec<double> lanes[kWide];
          for (int64_t i = 0; i < kWide; ++i) {
            lanes[i] = Vec<double>{};
            for (int64_t half = 0; half < W && e + i < E_; half += kWide) {
              lanes[i] += widen(sums + (e + i) * W + half);
            }
          }
          transpose<double>(lanes);
          for (int64_t i = 1; i < kWide; ++i) lanes[0] += lanes[i];
          store(partial_[piece * stride / kWide] + e, lanes[0]);
        }
      }
    });
    group_->parallel(stride / kWide, 1 + 4096 / group_->pieces, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Vec<double> total{};
        for (int64_t piece = 0; piece < group_->pieces; ++piece) {
          total += load(partial_[(piece * stride) / kWide + i]);
        }
        store(&total_[i * kWide], total);
      }
    });
  }

  // The same by body(count, block, sums, scratch), some blocks a call.
  template <typename Body>
  void sum_columns(int64_t scratch_vectors, Body&& body) {
    sum_pieces(scratch_vectors, [&](int64_t begin, int64_t end, C* sums, C* scratch) {
      each_few(begin, end, [&](auto count, int64_t b) { body(count, b, sums, scratch); });
    });
  }

  // taken[e] (from 0, or going on) + sum over the collected steps of a v[e] + u c[e], four
  // columns for every load of a and u.
  void take_collected(int64_t b, bool go_on, C* taken) const {
    constexpr int64_t kColumns = 4;
    const auto add = [&](auto columns, int64_t e) {
      Vec<C> sum[columns];
      for (int i = 0; i < columns; ++i) sum[i] = go_on ? load(taken + (e + i) * W) : Vec<C>{};
      for (int64_t s = 0; s < collected_count_; ++s) {
        const Vec<C> of_a = load(a(b, s)), of_u = load(u(b, s));
        for (int i = 0; i < columns; ++i) {
          const OfColumn& column = of_column_[s * E_ + e + i];
          sum[i] = fma(of_a, splat(column.v), fma(of_u, splat(column.c), sum[i]));
        }
      }
      for (int i = 0; i < columns; ++i) store(taken + (e + i) * W, sum[i]);
    };
    int64_t e = 0;
    for (; e + kColumns <= E_; e += kColumns) add(std::integral_constant<int, kColumns>{}, e);
    for (; e < E_; ++e) add(std::integral_constant<int, 1>{}, e);
  }

  const Group<T>* group_ = nullptr;
  T* out_ = nullptr;
  int64_t E_ = 0, blocks_ = 0, in_place_ = 0, slots_ = 0, collected_count_ = 0;
  C inverse_ = 0, inverse_rest_ = 0;  // of epsilon: the nearest number, and what it lacks
  double log_scale_ = 0;
  Vectors<C> own_;                   // [blocks - in_place, E]  of K
  Vectors<C> u_, first_u_;           // [blocks]
  Vectors<C> sums_;                  // [pieces, E]
  Vectors<C> room_;                  // a pass's own, for each range
  Vectors<C> taken_;                 // [blocks, E]
  Vectors<C> collected_;             // [blocks, slots, 2]
  Vectors<double> partial_;          // [pieces, E rounded up to vectors]
  std::vector<OfColumn> of_column_;  // [slots, E]
  std::vector<C> v_;                 // [E], and room for a vector
  std::vector<double> total_;        // [E], and room for a vector
};

// max_e |column sum / (n/E) - 1|; NaN stays.
template <typename Domain>
double column_error(const Domain& domain, int64_t E, double log_marginal) {
  if (log_marginal == -kInf) return 0;  // nobody is there
  double worst = 0;
  for (int64_t e = 0; e < E; ++e) worst = max_or_nan(worst, std::abs(domain.ratio(e) - 1));
  return worst;
}

struct Outputs {
  double* history;
  double* error;
  int32_t* steps;
};

// The forward of one group, in any domain.
template <typename T, typename Domain>
void iterate(
    Domain& domain, const Group<T>& group, int64_t iterations, double tolerance,
    const Outputs& out) {
  domain.start();
  int64_t step = 0;
  for (; step < iterations; ++step) {
    if (tolerance > 0 && step > 0 &&
        column_error(domain, group.E, group.log_marginal) <= tolerance) {
      break;
    }
    domain.step_columns();
    domain.step_rows(step + 1 == iterations);
    domain.get_columns(out.history + step * group.E);
  }
  *out.steps = static_cast<int32_t>(step);
  *out.error = column_error(domain, group.E, group.log_marginal);
  if (step < iterations) domain.write_plan();
}

// The backward of one group on logarithms, an exp for every entry and update.
template <typename T>
void backward_by_logs(
    const Group<T>& group, const T* grad, const double* history, int64_t step, T* grad_logits) {
  const int64_t tokens = group.tokens, E = group.E;
  const double inverse_marginal = group.log_marginal == -kInf ? 0 : std::exp(-group.log_marginal);
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
    // Row update: the potentials are those of this step.
    domain.reduce_columns(taken, 0, std::plus<>(), [&](int64_t t, int64_t e) {
      const double d = df[t] * domain.weight(t, e);
      out[t * E + e] -= d;
      return d;
    });
    for (int64_t e = 0; e < E; ++e) dh[e] -= taken[e];
    // Column update: f of the step before, h of this one.
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
  // Rounding of float32 sums alone is an error of about 1e-7: an aim near it needs float64.
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

// With P_i = exp(M + f_i + h_i) the plan after row update i, and
// Q_i = exp(M + f_{i-1} + h_i) / (n/E) the columns' softmax of iteration i:
//   f_i moves by -P_i (dM + dh_i) summed over e, h_i by -Q_i (dM + df_{i-1}) over t.
template <typename T>
void sinkhorn_backward(
    const T* grad, const T* logits, const double* history, const int32_t* steps, T* grad_logits,
    int64_t tokens, int64_t E, int64_t iterations, double epsilon, int64_t group_begin,
    int64_t group_end, const Parallel& parallel) {
  ScalingDomain<T, T> scaling;
  ScalingDomain<T, double> wide;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t at = g * tokens * E;
    const Group<T> group(logits + at, tokens, E, epsilon, parallel);
    const double* kept = history + g * iterations * E;
    if (steps[g] > 0 && group.template fits_scaling<T>()) {
      scaling.reset(group, grad_logits + at);
      scaling.backward(grad + at, kept, steps[g]);
    } else if (steps[g] > 0 && group.template fits_scaling<double>()) {
      wide.reset(group, grad_logits + at);
      wide.backward(grad + at, kept, steps[g]);
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
