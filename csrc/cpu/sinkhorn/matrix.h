// sinkhorn/matrix -- exp(M) of a group, and the passes over it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../buffer.h"
#include "group.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

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

// K[t, e] = exp(M[t, e] - max M), in numbers of type C, where Group::fits_scaling<C>().
//
// A vector of tokens is a block: a row's sum is then an addition of vectors, every token has the
// same arithmetic wherever it stands, and E needs no padding. An absent token, and a lane after the
// last token, has K = 0. A block of K is as large as its rows of the output where C is T: it is
// stored there until they are written, and an iteration's memory is the output's.
//
// Kept between groups for its memory.
template <typename T, typename C>
class ScalingMatrix {
 public:
  static constexpr int64_t W = kWidth<C>;
  // Blocks that a pass takes together, to keep several sums going and to load and store
  // the columns' less often.
  static constexpr int64_t kTogether = 4;

  void reset(const Group<T>& group, T* out) {
    group_ = &group;
    out_ = out;
    E_ = group.E;
    // What the next visit takes, where that is little enough to wait in the first cache.
    ahead_ = kTogether * E_ * kVectorBytes <= 8192 ? kTogether * E_ * W : 8 * W;
    blocks_ = (group.tokens + W - 1) / W;
    in_place_ = std::is_same_v<T, C> ? group.tokens / W : 0;
    own_.make((blocks_ - in_place_) * E_ * W);
    partial_.make(group.pieces * padded_columns());
    total_.make(padded_columns());
    const double inverse = group.inverse_epsilon;
    inverse_ = static_cast<C>(inverse);
    inverse_rest_ = static_cast<C>(inverse - static_cast<double>(inverse_));
    const double high = group.high * inverse;
    const bool fit = std::max(std::abs(high), std::abs(group.low * inverse)) <= 80;
    low_ = static_cast<C>(group.low);
    from_ = fit ? C{0} : static_cast<C>(group.high);
    factor_ = fit ? static_cast<C>(std::exp(-high)) : C{1};
  }

  const Group<T>& group() const { return *group_; }
  int64_t E() const { return E_; }
  int64_t blocks() const { return blocks_; }
  C inverse_epsilon() const { return inverse_; }

  Vec<C> K(int64_t b, int64_t e) const { return load(block(b) + e * W); }
  C* block(int64_t b) const {
    if constexpr (std::is_same_v<T, C>) {
      if (b < in_place_) return out_ + b * E_ * W;
    }
    return own_.get() + (b - in_place_) * E_ * W;
  }
  // Loads from K where a pass reads it first. K barely fits the second-level cache, or does not:
  // waiting for it would take half of the pass.
  Vec<C> load_ahead(const C* p) const {
    __builtin_prefetch(p + ahead_);
    return load(p);
  }

  static Vec<C> inverse(Vec<C> x) { return x > Vec<C>{} ? C{1} / x : Vec<C>{}; }

  // tile[e] = entry e of the block's tokens; `padding` after the last token.
  void pack(int64_t b, const T* from, C padding, C* tile) const {
    const T* rows = from + b * W * E_;
    const int64_t present = count(b);
    const auto turn = [&](int64_t e, int64_t width, auto row) {
      Vec<C> square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = row(i);
      transpose<C>(square);
      for (int64_t i = 0; i < width; ++i) store(tile + (e + i) * W, square[i]);
    };
    int64_t e = 0;
    for (; present == W && e + W <= E_; e += W) {  // nearly all rows: without a condition
      turn(e, W, [&](int64_t i) { return load_row(rows + i * E_ + e, W); });
    }
    for (; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      turn(e, width, [&](int64_t i) {
        return i < present ? load_row(rows + i * E_ + e, width) : splat(padding);
      });
    }
  }

  // The reverse of pack, to the output.
  void unpack(int64_t b, const C* tile) const {
    T* rows = out_ + b * W * E_;
    const int64_t present = count(b);
    for (int64_t e = 0; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      Vec<C> square[W];
      for (int64_t i = 0; i < W; ++i) square[i] = load(tile + std::min(e + i, E_ - 1) * W);
      transpose<C>(square);
      for (int64_t i = 0; i < present; ++i) store_row(rows + i * E_ + e, square[i], width);
    }
  }

  void fill_block(int64_t b) const {
    C* K = block(b);
    pack(b, group_->logits, -std::numeric_limits<C>::infinity(), K);
    for (int64_t e = 0; e < E_; ++e) store(K + e * W, power(load(K + e * W)));
  }

  // rows[i] = sum_e K[t, e] v[e] for the tokens t of block b + i, i < kRows, and
  // sums[e] += K[t, e] u[t] of the kColumns blocks before b.
  template <int kColumns, int kRows>
  void visit(int64_t b, const C* v, const Vec<C>* u, Vec<C>* rows, C* sums) const {
    Vec<C> total[kRows + 1]{}, factor[kColumns + 1];
    for (int i = 0; i < kColumns; ++i) factor[i] = u[i];
    // Blocks that each_few() hands out together are adjacent in memory.
    const C* of_rows = kRows > 0 ? block(b) : nullptr;
    const C* of_columns = kColumns > 0 ? block(b - kColumns) : nullptr;
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
    visit<kCount, 0>(b + kCount, nullptr, u, nullptr, sums);
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
      const Buffer<C> scratch(scratch_vectors * W);
      for (int64_t b = begin; b < end; ++b) visit(b, scratch.get());
    });
  }

  // Calls body(begin, end, sums, scratch) for the blocks of every piece; what it adds to
  // the sums [E] ends up in total(), added in C within a piece and in float64 from there.
  template <typename Body>
  void sum_pieces(int64_t scratch_vectors, Body&& body) {
    constexpr int64_t kWide = kWidth<double>, kBlocks = kPiece / W;
    const int64_t stride = padded_columns();
    const int64_t room = (E_ + scratch_vectors) * W;
    room_.make((group_->pieces / grain(E_) + 1) * room);
    turned_ = !turned_;
    group_->parallel(group_->pieces, grain(E_), [&](int64_t first, int64_t last) {
      // No range but this one begins between two multiples of the grain.
      C* sums = room_.get() + first / grain(E_) * room;
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
          store(partial_.get() + piece * stride + e, lanes[0]);
        }
      }
    });
    group_->parallel(stride / kWide, 1 + 4096 / group_->pieces, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Vec<double> total{};
        for (int64_t piece = 0; piece < group_->pieces; ++piece) {
          total += load(partial_.get() + piece * stride + i * kWide);
        }
        store(&total_[i * kWide], total);
      }
    });
  }

  // The same by body(count, block, sums, scratch), some blocks per call.
  template <typename Body>
  void sum_columns(int64_t scratch_vectors, Body&& body) {
    sum_pieces(scratch_vectors, [&](int64_t begin, int64_t end, C* sums, C* scratch) {
      each_few(begin, end, [&](auto count, int64_t b) { body(count, b, sums, scratch); });
    });
  }

  // [E], as sum_pieces() left them, and room for a vector.
  const double* total() const { return total_.get(); }

 private:
  // Columns that a row's sum in C takes one by one: over thousands it would round too often.
  static constexpr int64_t kRun = 256;

  int64_t count(int64_t b) const { return std::min(W, group_->tokens - b * W); }
  int64_t padded_columns() const {
    return (E_ + kWidth<double> - 1) / kWidth<double> * kWidth<double>;
  }

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

  const Group<T>* group_ = nullptr;
  T* out_ = nullptr;
  int64_t E_ = 0, ahead_ = 0, blocks_ = 0, in_place_ = 0;
  C inverse_ = 0, inverse_rest_ = 0;   // of epsilon: the nearest number, and what it lacks
  C from_ = 0, factor_ = 1, low_ = 0;  // K = factor exp((logit - from) / epsilon), or 0 below low
  bool turned_ = false;
  Buffer<C> own_;           // [blocks - in_place, E, W]  of K
  Buffer<C> room_;          // a pass's sums and scratch, for each range
  Buffer<double> partial_;  // [pieces, E padded]
  Buffer<double> total_;    // [E padded]
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
