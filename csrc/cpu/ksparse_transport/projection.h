// ksparse_transport/projection -- the k-sparse projection P_k of one column, from its candidates:
// the entries that may get a non-zero share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../../common/infinity.h"
#include "../buffer.h"
#include "../keys.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The candidates of a column and their projection onto the simplex. One object serves many columns,
// to reuse its memory.
class Projection {
 public:
  using Key = SignedKey<double>;

  // Makes room for `size` candidates.
  void make(int64_t size) {
    constexpr int64_t kVector = std::max(kWidth<float>, kWidth<double>);
    token_.make(size + kVector);
    value_.make(size + kVector);
    share_.make(size + kVector);
    key_.make(size + kVector);
    left_.make(size + kVector);
  }

  // The candidates, which the caller fills in ascending order of token.
  int32_t* token() const { return token_.get(); }
  double* value() const { return value_.get(); }

  // Returns the cut of the first n values for k picks, and stores their keys.
  Cut<Key> find_first(int64_t n, int64_t k) {
    constexpr int64_t W = kWidth<double>;
    Key* keys = key_.get();
    Vec<Key> low = splat(std::numeric_limits<Key>::max()), high = splat(kNoKey<double>);
    for (int64_t i = 0; i < n; i += W) {
      const Vec<double> value = load(&value_[i]);
      Vec<Key> key = signed_key<double>(value);
      const Mask<Key> valid = lane_index<Key>() < splat(static_cast<Key>(n - i));
      low = valid ? min<Key>(low, key) : low;
      key = valid ? key : splat(kNoKey<double>);
      high = max<Key>(high, key);
      store(keys + i, key);
    }
    Key least = low[0], most = high[0];
    for (int64_t i = 1; i < W; ++i) {
      least = std::min(least, low[i]);
      most = std::max(most, high[i]);
    }
    return find_cut(keys, n, k, least, most, left_.get());
  }

  // Keeps the first k candidates (value descending, then token ascending), in order of token.
  // Returns the k-th value, or -inf if there are fewer candidates.
  double keep_first(int64_t count, int64_t k) {
    kept_ = count;
    if (count < k) return -kInfinity;
    const Cut<Key> cut = find_first(count, k);
    int64_t ties = cut.ties;
    int32_t* token = token_.get();
    double* value = value_.get();
    Key* key = key_.get();
    const auto keep = [&](auto&& stays) {
      int64_t kept = 0;
      for (int64_t i = 0; i < kept_; ++i) {
        token[kept] = token[i];
        value[kept] = value[i];
        key[kept] = key[i];
        kept += stays(key[i]);
      }
      kept_ = kept;
    };
    keep([&](Key it) { return it >= cut.key; });
    if (kept_ > k) keep([&](Key it) { return it > cut.key || ties-- > 0; });
    return *std::min_element(value, value + kept_);
  }

  // Projects the kept values, divided by `scale`, onto the simplex. Returns the threshold: a value
  // above the threshold gets a share. At first the support has all kept values. Each round drops
  // the values at or below the threshold of the current support, until a round drops no value. Most
  // often no value is dropped at all. The values need not be sorted.
  double threshold(double scale) {
    tau_ = kUndefined;
    if (kept_ == 0) return -kInfinity;
    constexpr int64_t W = kWidth<double>;
    double *value = value_.get(), *share = share_.get();
    const int64_t end = (kept_ + W - 1) / W * W;
    std::fill(value + kept_, value + end, -kInfinity);
    Vec<double> top = splat(-kInfinity);
    for (int64_t i = 0; i < end; i += W) top = max<double>(load(value + i), top);
    double largest = top[0];
    for (int64_t i = 1; i < W; ++i) largest = std::max(largest, top[i]);
    for (int64_t i = 0; i < end; i += W) store(share + i, (load(value + i) - largest) / scale);
    double low = -kInfinity;
    for (int64_t support = 0;;) {
      Vec<double> total{};
      Mask<double> above{};
      for (int64_t i = 0; i < end; i += W) {
        const Vec<double> u = load(share + i);
        const Mask<double> in = u > low;
        total += in ? u : Vec<double>{};
        above -= in;  // true is -1
      }
      int64_t count = 0;
      for (int64_t i = 0; i < W; ++i) count += above[i];
      if (count == support || count == 0) break;
      support = count;
      low = tau_ = (sum<double>(total) - 1) / static_cast<double>(count);
    }
    return largest + scale * tau_;
  }

  int64_t kept() const { return kept_; }
  int32_t kept_token(int64_t i) const { return token_[i]; }
  // The share of kept entry i, valid after threshold(). If the share is not positive, the entry is
  // not in the support.
  double kept_share(int64_t i) const { return share_[i] - tau_; }
  Key key(int64_t i) const { return key_[i]; }

 private:
  Buffer<int32_t> token_;
  Buffer<double> value_, share_;
  Buffer<Key> key_, left_;
  int64_t kept_ = 0;
  double tau_ = 0;
};

}  // namespace
}  // namespace vmoe::cpu::VMOE_ISA
