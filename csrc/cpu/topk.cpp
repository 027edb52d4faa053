#include "../topk.h"

#include <memory>

#include "buffer.h"
#include "keys.h"
#include "leaders.h"
#include "select.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Arguments that all kernels below share. Row (a, m) is x[a, :, m].
template <typename T>
struct Axis {
  const T* x;        // [N, n, M]
  T* values;         // [N, M, k]
  int32_t* indices;  // [N, M, k]
  int64_t n, M, k;
  // The end of the last matrix [n, M] that contains a row of this call. Loads read nothing at or
  // past `end`.
  const T* end;

  const T* column(int64_t row) const { return x + (row / M) * n * M + row % M; }

  // `from` is column(row). The value is read again, because its key has lost the sign of zero and
  // the payload of NaN.
  void write(const T* from, int64_t row, int64_t j, int32_t index) const {
    values[row * k + j] = from[index * M];
    indices[row * k + j] = index;
  }
};

// Lane i is row `row` + i, for i < count.
template <typename T, int K>
void write_leaders(const Leaders<T, K>& leaders, const Axis<T>& axis, int64_t row, int64_t count) {
  const T* from = axis.column(row);
  const int64_t step = axis.M == 1 ? axis.n : 1;
  for (int j = 0; j < K; ++j) {
    SignedKey<T> place[kWidth<T>];
    store(place, leaders.place(j));
    for (int64_t i = 0; i < count; ++i) {
      axis.write(from + i * step, row + i, j, static_cast<int32_t>(place[i]));
    }
  }
}

// Picks from the contiguous rows [row, row + count), count <= width (M = 1).
template <typename T, int K>
void few_of_rows(const Axis<T>& axis, int64_t row, int64_t count) {
  constexpr int64_t W = kWidth<T>;
  Leaders<T, K> leaders;
  for (int64_t i = 0; i < axis.n; i += W) {
    Vec<T> block[W];
    for (int64_t r = 0; r < W; ++r) {
      // Lanes without a row repeat the last row.
      block[r] = load_within(axis.x + (row + std::min(r, count - 1)) * axis.n + i, axis.end);
    }
    transpose<T>(block);
    for (int64_t j = 0; j < std::min(W, axis.n - i); ++j) {
      leaders.insert(signed_key<T>(block[j]), i + j);
    }
  }
  write_leaders(leaders, axis, row, count);
}

// Picks from the adjacent columns [row, row + count), count <= width, of one matrix.
template <typename T, int K>
void few_of_columns(const Axis<T>& axis, int64_t row, int64_t count) {
  Leaders<T, K> leaders;
  const T* from = axis.column(row);
  for (int64_t i = 0; i < axis.n; ++i) {
    leaders.insert(signed_key<T>(load_within(from + i * axis.M, axis.end)), i);
  }
  write_leaders(leaders, axis, row, count);
}

// The same as few_of_columns, for longer columns. First finds a lower bound of the K-th largest
// key: the K-th largest of the maxima of blocks of kBlock entries. Then ranks only the entries that
// reach the bound. These entries are few, because the bound is close to the K-th largest key. If
// more than kRoom entries of a column reach the bound (ties, or a sorted column), returns false
// without writing.
template <typename T, int K>
bool few_of_long_columns(const Axis<T>& axis, int64_t row, int64_t count) {
  using Key = SignedKey<T>;
  constexpr int64_t W = kWidth<T>, kBlock = 4, kRoom = 32;
  const T* from = axis.column(row);
  const Buffer<Key> keys(axis.n * W);
  Vec<Key> best[K], high = splat(kNoKey<T>);
  for (int j = 0; j < K; ++j) best[j] = high;
  for (int64_t i = 0; i < axis.n; ++i) {
    const Vec<Key> key = signed_key<T>(load_within(from + i * axis.M, axis.end));
    store(keys.get() + i * W, key);
    high = max<Key>(key, high);
    if (i % kBlock < kBlock - 1) continue;
    for (int j = 0; j < K; ++j) {
      const Vec<Key> other = best[j];
      best[j] = max<Key>(other, high);
      high = min<Key>(other, high);
    }
    high = splat(kNoKey<T>);
  }
  const Vec<Key> bound = best[K - 1];

  // The entries that reach the bound, by lane, in order of index.
  Key reached[kRoom * W], places[kRoom * W] = {};
  std::fill(reached, reached + kRoom * W, kNoKey<T>);
  int64_t filled[W] = {}, most = 0;
  constexpr int64_t kRows = 64;
  int32_t at[(kRows + 1) * W];
  for (int64_t first = 0; first < axis.n; first += kRows) {
    int64_t found = 0;
    for (int64_t i = first; i < std::min(first + kRows, axis.n); ++i) {
      const Mask<Key> reaches = load(keys.get() + i * W) >= bound;
      found += compress_index<Key>(at + found, reaches, static_cast<int32_t>(i * W));
    }
    for (int64_t f = 0; f < found; ++f) {
      const int64_t lane = at[f] % W, j = filled[lane]++;
      if (j == kRoom) return false;
      reached[j * W + lane] = keys[at[f]];
      places[j * W + lane] = at[f] / W;
      most = std::max(most, j + 1);
    }
  }
  Leaders<T, K> leaders;
  for (int64_t j = 0; j < most; ++j) leaders.insert(load(reached + j * W), load(places + j * W));
  write_leaders(leaders, axis, row, count);
  return true;
}

template <typename T, int K = 1>
void few(const Axis<T>& axis, int64_t row, int64_t count) {
  if constexpr (K < kFew) {
    if (axis.k > K) return few<T, K + 1>(axis, row, count);
  }
  if (axis.M == 1) return few_of_rows<T, K>(axis, row, count);
  if constexpr (K > 2) {
    const bool long_enough = axis.n >= 64 && axis.n <= 1024;  // lengths whose keys fit the cache
    if (long_enough && few_of_long_columns<T, K>(axis, row, count)) return;
  }
  few_of_columns<T, K>(axis, row, count);
}

// More than kFew picks per row: finds the cut among the row's keys, then sorts the picks that pass
// it.
template <typename T>
class Many {
 public:
  explicit Many(const Axis<T>& axis)
      : axis_(axis),
        // One vector more than needed: with a stride of a power of two, all rows would share cache
        // sets.
        stride_((axis.n + W - 1) / W * W + W),
        keys_((axis.M == 1 ? 1 : W) * stride_),
        kept_(stride_),
        places_(stride_),
        picks_(2 * axis.k) {}

  // Adjacent columns of one matrix, transposed into the buffer.
  void columns(int64_t row, int64_t count) {
    Vec<Key> low = splat(std::numeric_limits<Key>::max()), high = splat(kNoKey<T>);
    const T* from = axis_.column(row);
    for (int64_t i = 0; i < axis_.n; i += W) {
      Vec<Key> block[W];
      for (int64_t r = 0; r < W; ++r) {
        block[r] = splat(kNoKey<T>);
        if (i + r >= axis_.n) continue;
        block[r] = signed_key<T>(load_within(from + (i + r) * axis_.M, axis_.end));
        low = min<Key>(low, block[r]);
        high = max<Key>(high, block[r]);
      }
      transpose<Key>(block);
      for (int64_t r = 0; r < count; ++r) store(keys_.get() + r * stride_ + i, block[r]);
    }
    for (int64_t r = 0; r < count; ++r) {
      pick(row + r, keys_.get() + r * stride_, low[r], high[r]);
    }
  }

  void row(int64_t row) {
    Key low = std::numeric_limits<Key>::max(), high = kNoKey<T>;
    const T* from = axis_.column(row);
    Key* keys = keys_.get();
    for (int64_t i = 0; i < axis_.n; i += W) {
      store(keys + i, signed_key<T>(load_within(from + i, axis_.end)));
    }
    store(keys + axis_.n, splat(kNoKey<T>));
    for (int64_t i = 0; i < axis_.n; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    pick(row, keys, low, high);
  }

 private:
  using Key = SignedKey<T>;
  using P = Pick<OrderKey<T>>;
  static constexpr int64_t W = kWidth<T>;

  void pick(int64_t row, const Key* keys, Key low, Key high) {
    const int64_t k = axis_.k;
    auto [cut, ties] = find_cut(keys, axis_.n, k, low, high, kept_.get());
    Key* chosen = kept_.get();
    int32_t* places = places_.get();
    int64_t passed = 0;
    for (int64_t i = 0; i < axis_.n; i += W) {
      const Vec<Key> key = load(keys + i);
      const Mask<Key> passes = key >= splat(cut);
      if (!lane_bits<Key>(passes)) continue;
      compress<Key>(chosen + passed, passes, key);
      passed += compress_index<Key>(places + passed, passes, static_cast<int32_t>(i));
    }
    if (passed > k) {  // more entries tie with the k-th than remain to pick
      int64_t stay = 0;
      for (int64_t i = 0; i < passed; ++i) {
        if (chosen[i] == cut && ties-- <= 0) continue;
        chosen[stay] = chosen[i];
        places[stay++] = places[i];
      }
    }
    k <= kRanking ? rank(row) : sort(row);
  }

  // Writes the picks in order, for few picks. The position of a pick is the number of picks before
  // it: picks with a larger key, and picks with an equal key and a lower index. A pick with a lower
  // index is compared with the key minus 1, which counts equal keys without a branch.
  void rank(int64_t row) {
    Key* chosen = kept_.get();
    store(chosen + axis_.k, splat(kNoKey<T>));
    const T* from = axis_.column(row);
    for (int64_t i = 0; i < axis_.k; ++i) {
      Vec<Key> before{};
      for (int64_t j = 0; j < axis_.k; j += W) {
        const Mask<Key> earlier = lane_index<Key>() < splat(static_cast<Key>(i - j));
        before -= load(chosen + j) > splat(chosen[i]) + earlier;
      }
      axis_.write(from, row, sum<Key>(before), places_[i]);
    }
  }

  void sort(int64_t row) {
    P* picks = picks_.get();
    for (int64_t i = 0; i < axis_.k; ++i) picks[i] = {unsigned_key<T>(kept_[i]), places_[i]};
    sort_picks(picks, picks + axis_.k, axis_.k);
    const T* from = axis_.column(row);
    for (int64_t j = 0; j < axis_.k; ++j) axis_.write(from, row, j, picks[j].index);
  }

  static constexpr int64_t kRanking = 8 * W;

  const Axis<T>& axis_;
  int64_t stride_;
  Buffer<Key> keys_;        // [width or 1, stride]
  Buffer<Key> kept_;        // [stride]  scratch of find_cut, then the keys of the picks
  Buffer<int32_t> places_;  // [stride]  the indices of the picks
  Buffer<P> picks_;         // [2, k]
};

}  // namespace

template <typename T>
void topk(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t M, int64_t k, int64_t row_begin,
    int64_t row_end) {
  constexpr int64_t W = kWidth<T>;
  if (k == 0 || row_begin >= row_end) return;
  const T* end = x + ((row_end - 1) / M + 1) * n * M;
  const Axis<T> axis{x, values, indices, n, M, k, end};
  if (M == 1 && row_end - row_begin < W / 2) {  // most lanes would be idle
    std::vector<Pick<OrderKey<T>>> picks;
    for (int64_t row = row_begin; k <= kFew && row < row_end; ++row) {
      select_few(x + row * n, n, k, picks);
      for (int64_t j = 0; j < k; ++j) axis.write(x + row * n, row, j, picks[j].index);
    }
    if (k <= kFew) return;
  }
  std::unique_ptr<Many<T>> many = k <= kFew ? nullptr : std::make_unique<Many<T>>(axis);
  for (int64_t row = row_begin; row < row_end;) {
    // At most one vector of rows and, if M > 1, rows of one matrix only.
    const int64_t matrix_end = M == 1 ? row_end : (row / M + 1) * M;
    const int64_t count = std::min({W, row_end - row, matrix_end - row});
    if (!many) {
      few<T>(axis, row, count);
    } else if (M > 1) {
      many->columns(row, count);
    } else {
      for (int64_t r = row; r < row + count; ++r) many->row(r);
    }
    row += count;
  }
}

template void topk(const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);
template void topk(const double*, double*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
