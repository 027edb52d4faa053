// sinkhorn/matrix -- exp(M) of a group, and the passes over it.
#pragma once

#include <cstring>
#include <type_traits>

#include "../buffer.h"
#include "group.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Loads width<double> values of type C as doubles.
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

// K[t, e] = exp(M[t, e] - max M), in numbers of type C, for groups with fits_scaling<C>().
//
// K is stored in blocks of one vector of tokens, [blocks, E, width]. Then a row sum adds vectors,
// every token gets the same arithmetic at any position, and E needs no padding. K is 0 for masked
// tokens and in lanes after the last token. If C is T, a block of K is as large as its rows of the
// output. K is then stored in the output until the rows are written, so an iteration needs no
// further memory.
//
// One object serves many groups, to reuse its memory.
template <typename T, typename C>
class ScalingMatrix {
 public:
  static constexpr int64_t W = kWidth<C>;
  // Blocks that a pass computes together. Several blocks at a time give more independent sums, and
  // fewer loads and stores of the column sums.
  static constexpr int64_t kTogether = 4;

  void reset(const Group<T>& group, T* out) {
    group_ = &group;
    out_ = out;
    E_ = group.E;
    // The number of entries from a load to its prefetch: the entries of one visit, if they fit in
    // the first-level cache, and otherwise eight vectors.
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
  // Loads from K and prefetches, for the first read of K in a pass. K is about as large as the
  // second-level cache, or larger. Without the prefetch, half of the time of a pass would be spent
  // waiting for K.
  Vec<C> load_ahead(const C* p) const {
    __builtin_prefetch(p + ahead_);
    return load(p);
  }

  static Vec<C> inverse(Vec<C> x) { return x > Vec<C>{} ? C{1} / x : Vec<C>{}; }

  // tile[e] = entry e of the tokens of block b, or `padding` after the last token.
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
    for (; present == W && e + W <= E_; e += W) {  // nearly all rows, without a condition
      turn(e, W, [&](int64_t i) { return load_row(rows + i * E_ + e, W); });
    }
    for (; e < E_; e += W) {
      const int64_t width = std::min(W, E_ - e);
      turn(e, width, [&](int64_t i) {
        return i < present ? load_row(rows + i * E_ + e, width) : splat(padding);
      });
    }
  }

  // The reverse of pack: writes the tile to the output.
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

  // rows[i] = sum_e K[t, e] v[e] for the tokens t of block b + i, i < kRows. sums[e] += K[t, e]
  // u[t] for the kColumns blocks before b.
  template <int kColumns, int kRows>
  void visit(int64_t b, const C* v, const Vec<C>* u, Vec<C>* rows, C* sums) const {
    Vec<C> total[kRows + 1]{}, factor[kColumns + 1];
    for (int i = 0; i < kColumns; ++i) factor[i] = u[i];
    // The blocks of one call of each_few() are adjacent in memory.
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

  // sums[e] += K[t, e] u[t] for the kCount blocks from b on.
  template <int kCount>
  void add_columns(int64_t b, const Vec<C>* u, C* sums) const {
    visit<kCount, 0>(b + kCount, nullptr, u, nullptr, sums);
  }

  // Calls body(count, block) for the blocks [begin, end). count is kTogether or 1.
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

  // Calls body(begin, end, sums, scratch) for the blocks of every piece. body adds to sums [E, W].
  // total() is the sum over all lanes and pieces, added in type C within a lane of a piece and in
  // float64 across lanes and pieces.
  template <typename Body>
  void sum_pieces(int64_t scratch_vectors, Body&& body) {
    constexpr int64_t kWide = kWidth<double>, kBlocks = kPiece / W;
    const int64_t stride = padded_columns();
    const int64_t room = (E_ + scratch_vectors) * W;
    room_.make((group_->pieces / grain(E_) + 1) * room);
    // A pass that ended with the last piece leaves the last pieces in the cache. So the next pass
    // begins with the last pieces and goes backwards. The pass after that goes forwards again.
    backwards_ = !backwards_;
    group_->parallel(group_->pieces, grain(E_), [&](int64_t first, int64_t last) {
      // Each range has its own memory: no two ranges begin between the same multiples of the grain.
      C* sums = room_.get() + first / grain(E_) * room;
      for (int64_t i = first; i < last; ++i) {
        const int64_t piece = backwards_ ? first + last - 1 - i : i;
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

  // sum_pieces() with body(count, block, sums, scratch), several blocks per call.
  template <typename Body>
  void sum_columns(int64_t scratch_vectors, Body&& body) {
    sum_pieces(scratch_vectors, [&](int64_t begin, int64_t end, C* sums, C* scratch) {
      each_few(begin, end, [&](auto count, int64_t b) { body(count, b, sums, scratch); });
    });
  }

  // [E], the result of sum_pieces(), with room for a whole vector.
  const double* total() const { return total_.get(); }

 private:
  // Columns of a row that are summed in type C before the sum is added to the total: one sum over
  // thousands of columns would accumulate rounding errors.
  static constexpr int64_t kRun = 256;

  int64_t count(int64_t b) const { return std::min(W, group_->tokens - b * W); }
  int64_t padded_columns() const {
    return (E_ + kWidth<double> - 1) / kWidth<double> * kWidth<double>;
  }

  // Loads `width` entries of a row.
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

  // exp(M - max M) of one vector. In float32, rounding M - max M would change the result by up to
  // 2e-6. So x - from_ must be exact. If exp(M) fits the type, factor_ is exp(-max M) and from_ is
  // 0. Otherwise the logits are within a factor of 2 of each other, so their difference is exact.
  // `rest` corrects the rounding error of the product with 1 / epsilon. exp_negative is also valid
  // for positive arguments up to 88.
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
  C inverse_ = 0, inverse_rest_ = 0;   // 1 / epsilon, and its rounding error
  C from_ = 0, factor_ = 1, low_ = 0;  // K = factor exp((logit - from) / epsilon), or 0 below low
  bool backwards_ = false;             // the direction of the last pass of sum_pieces()
  Buffer<C> own_;                      // [blocks - in_place, E, W]  of K
  Buffer<C> room_;                     // the sums and the scratch of each range
  Buffer<double> partial_;             // [pieces, E padded]
  Buffer<double> total_;               // [E padded]
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
