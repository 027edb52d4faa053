// sinkhorn_scaling -- the iteration on exponentials, where they fit.
#pragma once

#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>

#include "sinkhorn_group.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

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
  C* operator[](int64_t i) const { return reinterpret_cast<C*>(room_.get()) + i * kWidth<C>; }

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
// K[t, e] = exp(M[t, e] - max M), a vector of tokens a block: a row's sum is then
// an addition of vectors, every token has the same arithmetic wherever it stands, and E
// needs no padding. An absent token, and a lane behind the last, has K = 0.
// The potentials are exp(f_t) = u_t exp(-max M - log_scale) and
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
    // What the next visit takes, where that is little enough to wait in the first cache.
    ahead_ = kTogether * E_ * kVectorBytes <= 8192 ? kTogether * E_ * W : 8 * W;
    blocks_ = (group.tokens + W - 1) / W;
    in_place_ = std::is_same_v<T, C> ? group.tokens / W : 0;
    own_.make((blocks_ - in_place_) * E_);
    u_.make(blocks_);
    partial_.make(group.pieces * ((E_ + kWidth<double> - 1) / kWidth<double>));
    v_.assign(E_ + kWidth<double>, 0);
    total_.resize(E_ + kWidth<double>);
    const double inverse = group.inverse_epsilon;
    inverse_ = static_cast<C>(inverse);
    inverse_rest_ = static_cast<C>(inverse - static_cast<double>(inverse_));
    const double high = group.high * inverse;
    const bool fit = std::max(std::abs(high), std::abs(group.low * inverse)) <= 80;
    low_ = static_cast<C>(group.low);
    from_ = fit ? C{0} : static_cast<C>(group.high);
    factor_ = fit ? static_cast<C>(std::exp(-high)) : C{1};
  }

  // K, and the sums of the columns at f = 0.
  void start() {
    log_scale_ = -group_->high * group_->inverse_epsilon;
    sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
      Vec<C> u[count];
      for (int i = 0; i < count; ++i) {
        fill_block(b + i);
        u[i] = splat(C{1});
      }
      add_columns<count>(b, u, sums);
    });
  }

  bool step_columns() {
    const double least = *std::min_element(total_.begin(), total_.begin() + E_);
    log_scale_ += group_->log_marginal - std::log(least);
    bool moved = false;
    for (int64_t e = 0; e < E_; ++e) {
      const double v = least / total_[e];
      // Within a rounding of where it was it stays: last bits would go to and fro for ever.
      if (std::abs(v - v_[e]) <= 0.75 * std::numeric_limits<C>::epsilon() * v) continue;
      v_[e] = static_cast<C>(v);
      moved = true;
    }
    return moved;
  }

  // The row update and the sums that the next column update asks for, in one pass; the
  // plan too, where this is the last. The sums of some rows and the columns' part of the
  // rows before go together: neither waits for the other, and the latter are still near.
  void step_rows(bool last) {
    sum_pieces(last ? E_ : 0, [&](int64_t begin, int64_t end, C* sums, C* tile) {
      Vec<C> before[kTogether]{};  // set, or the compiler takes it for read unset
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
  //
  // As the columns of Q_i and the rows of P_i sum to 1, |dh_i| + |df_{i-1}| + |dh_{i-1}| + ...
  // in the 1-norm never grow, and each is what its step adds to the gradient at most. Where the
  // rest of them cannot reach the rounding of the first, the steps end.
  void backward(const T* grad, const double* history, int64_t steps) {
    const int64_t slots = std::min(steps, kCollected) + 1;
    slot_ = blocks_ | 1;  // a power of two would share cache sets
    collected_.make(2 * slot_ * slots);
    of_column_.resize(slots * E_);
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
    // Returns the 1-norm. The sum of dh is 0, since to add a constant to h changes no plan; what
    // rounding left of it would never fade.
    const auto set_dh = [&](double sign) {
      for (int64_t e = 0; e < E_; ++e) dh[e] = sign * v_[e] * total_[e];
      const double mean = std::accumulate(dh.begin(), dh.end(), 0.0) / static_cast<double>(E_);
      double norm = 0;
      for (double& d : dh) norm += std::abs(d -= mean);
      return norm;
    };
    double norm = set_dh(1);
    const double negligible = norm * std::numeric_limits<C>::epsilon();

    const double first_scale = -group_->high * group_->inverse_epsilon;
    for (int64_t step = steps;; --step) {
      const int64_t s = collected_count_++;
      const bool done = 2 * static_cast<double>(step) * norm <= negligible;
      const double log_before = step > 1 ? log_scale(history + (step - 2) * E_) : first_scale;
      const double factor = done ? 0 : std::exp(log_scale_ - log_before - group_->log_marginal);
      for (int64_t e = 0; e < E_; ++e) {
        of_column_[s * E_ + e] = {v_[e], static_cast<C>(dh[e] * v_[e] * factor)};
      }
      if (step == 1 || done) {
        each_block(0, [&](int64_t b, C*) { store(u(b, s), splat(C{1})); });
        break;
      }
      set_columns(history + (step - 2) * E_);
      sum_columns(0, [&](auto count, int64_t b, C* sums, C*) {
        Vec<C> rows[count], dots[count], da[count];
        for (int i = 0; i < count; ++i) rows[i] = dots[i] = Vec<C>{};
        for (int64_t e = 0; e < E_; ++e) {
          const Vec<C> v = splat(v_[e]), c = splat(of_column_[s * E_ + e].c);
          for (int i = 0; i < count; ++i) {
            const Vec<C> k = load_ahead(block(b + i) + e * W);
            rows[i] = fma(k, v, rows[i]);
            dots[i] = fma(k, c, dots[i]);
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
      norm = set_dh(-1);
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
  // Columns that a row's sum in C takes one by one: over thousands it would round too often.
  static constexpr int64_t kRun = 256;
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
  // Of K, where a pass first comes by. K just fits the second cache, or does not: to wait
  // for it would be half of a pass.
  Vec<C> load_ahead(const C* p) const {
    __builtin_prefetch(p + ahead_);
    return load(p);
  }
  // What the backward collects of a block's tokens.
  C* a(int64_t b, int64_t s) const { return collected_[2 * (s * slot_ + b)]; }
  C* u(int64_t b, int64_t s) const { return collected_[2 * (s * slot_ + b) + 1]; }
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
    const auto turn = [&](int64_t e, int64_t width, auto row) {
      Vec<C> square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = row(i);
      transpose<C>(square);
      for (int64_t i = 0; i < width; ++i) store(tile + (e + i) * W, square[i]);
    };
    int64_t e = 0;
    for (; there == W && e + W <= E_; e += W) {  // nearly all of them, and no questions asked
      turn(e, W, [&](int64_t i) { return load_row(rows + i * E_ + e, W); });
    }
    for (; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      turn(e, width, [&](int64_t i) {
        return i < there ? load_row(rows + i * E_ + e, width) : splat(nobody);
      });
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

  // exp(M - max M). To that distance float32 may be off by 2e-6: where exp(M) fits it is taken
  // of M itself and the rest multiplied, and elsewhere the logits are within a factor of 2 and
  // their distance exact. What the exponent lacks by epsilon is multiplied in. exp_negative has
  // no need of its sign up to 88.
  Vec<C> power(Vec<C> x) const {
    const Vec<C> difference = x - from_;
    const Vec<C> exponent = difference * inverse_;
    Vec<C> value = exp_negative(exponent);
    if constexpr (std::is_same_v<C, float>) {
      const Vec<C> rest = fma(
          difference, splat(inverse_rest_), product_error(difference, splat(inverse_), exponent));
      value = fma(value, rest, value);
    }
    return x >= low_ ? value * factor_ : Vec<C>{};
  }

  void fill_block(int64_t b) const {
    C* K = block(b);
    pack(b, group_->logits, -std::numeric_limits<C>::infinity(), K);
    for (int64_t e = 0; e < E_; ++e) store(K + e * W, power(load(K + e * W)));
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
    Vec<C> total[kRows + 1]{}, factor[kColumns + 1];
    for (int i = 0; i < kColumns; ++i) factor[i] = u[i];
    // As it is `few` blocks, they lie one behind another.
    const C* of_rows = kRows > 0 ? block(b) : nullptr;
    const C* of_columns = kColumns > 0 ? block(b - kColumns) : nullptr;
    const C* v = v_.data();
    const int64_t E = E_, next = E_ * W, ahead = ahead_;
    for (int64_t begin = 0; begin < E; begin += kRun) {
      const int64_t end = std::min(begin + kRun, E);
      Vec<C> row[kRows + 1]{};
      for (int64_t e = begin; e < end; ++e) {
        if constexpr (kRows > 0) {
          const Vec<C> of_column = splat(v[e]);
          for (int i = 0; i < kRows; ++i) {
            __builtin_prefetch(of_rows + i * next + ahead);
            row[i] = fma(load(of_rows + i * next), of_column, row[i]);
          }
          of_rows += W;
        }
        if constexpr (kColumns > 0) {
          Vec<C> sum = load(sums + e * W);
          for (int i = 0; i < kColumns; ++i) {
            sum = fma(load(of_columns + i * next), factor[i], sum);
          }
          store(sums + e * W, sum);
          of_columns += W;
        }
      }
      for (int i = 0; i < kRows; ++i) total[i] += row[i];
    }
    for (int i = 0; i < kRows; ++i) rows[i] = total[i];
  }

  // sums[e] += K[t, e] u[t] of these blocks.
  template <int kCount>
  void add_columns(int64_t b, const Vec<C>* u, C* sums) const {
    visit<kCount, 0>(b + kCount, u, nullptr, sums);
  }

  // Calls body(count, block) for the blocks [begin, end), some at a time.
  template <typename Body>
  void each_few(int64_t begin, int64_t end, Body&& body) const {
    const int64_t in_a_row = std::min(end, in_place_ > 0 ? in_place_ : blocks_);
    int64_t b = begin;
    for (; b + kTogether <= in_a_row; b += kTogether) {
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
    turned_ = !turned_;
    group_->parallel(group_->pieces, grain(E_), [&](int64_t first, int64_t last) {
      // No range but this one begins between two multiples of the grain.
      C* sums = room_[first / grain(E_) * room];
      for (int64_t i = first; i < last; ++i) {
        const int64_t piece = turned_ ? first + last - 1 - i : i;
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
  int64_t E_ = 0, ahead_ = 0, blocks_ = 0, in_place_ = 0, slot_ = 0, collected_count_ = 0;
  C inverse_ = 0, inverse_rest_ = 0;   // of epsilon: the nearest number, and what it lacks
  C from_ = 0, factor_ = 1, low_ = 0;  // K = factor exp((logit - from) / epsilon), or 0 below low
  double log_scale_ = 0;
  bool turned_ = false;
  Vectors<C> own_;                   // [blocks - in_place, E]  of K
  Vectors<C> u_;                     // [blocks]
  Vectors<C> sums_;                  // [pieces, E]
  Vectors<C> room_;                  // a pass's own, for each range
  Vectors<C> taken_;                 // [blocks, E]
  Vectors<C> collected_;             // [slots, blocks or one more, 2]; slots not used are no memory
  Vectors<double> partial_;          // [pieces, E rounded up to vectors]
  std::vector<OfColumn> of_column_;  // [slots, E]
  std::vector<C> v_;                 // [E], and room for a vector
  std::vector<double> total_;        // [E], and room for a vector
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
