// team -- reductions over a team. A team is the threads that compute one row or column: some lanes
// of a warp, or a block. A reduction has a fixed order, and every thread of the team gets its
// result.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/infinity.h"
#include "../common/order.h"
#include "launch.h"

namespace vmoe::cuda {

// The inverse of order_key, which returns some NaN for the key of NaN.
__device__ inline float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
__device__ inline double value_of(uint64_t key) {
  const uint64_t bits = key >> 63 ? key ^ (uint64_t{1} << 63) : ~key;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Sum {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Least {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};
// The maximum, or NaN if either argument is NaN.
struct Largest {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    if constexpr (std::is_floating_point_v<V>) {
      return !(b <= a) && a == a ? b : a;
    } else {
      return a < b ? b : a;
    }
  }
};

template <typename Join>
constexpr bool kExtreme = std::is_same_v<Join, Least> || std::is_same_v<Join, Largest>;

// The least or largest key (order.h) of a warp, by one or two instructions instead of a butterfly
// of shuffles.
template <typename Join>
__device__ uint32_t extreme(uint32_t key) {
  if constexpr (std::is_same_v<Join, Least>) {
    return __reduce_min_sync(kAllLanes, key);
  } else {
    return __reduce_max_sync(kAllLanes, key);
  }
}
template <typename Join>
__device__ uint64_t extreme(uint64_t key) {
  const auto top = static_cast<uint32_t>(key >> 32), first = extreme<Join>(top);
  const uint32_t none = std::is_same_v<Join, Least> ? UINT32_MAX : 0;
  const uint32_t rest = extreme<Join>(top == first ? static_cast<uint32_t>(key) : none);
  return uint64_t{first} << 32 | rest;
}

// Reduces the values of `lanes` adjacent lanes by `join`. `lanes` is a power of two. All lanes of
// the warp must call this.
template <typename V, typename Join>
__device__ V join_lanes(V value, int lanes, Join join) {
  for (int turn = lanes / 2; turn > 0; turn /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, turn));
  }
  return value;
}

// A team of kLanes adjacent lanes. Teams of the same warp may call `join` at different times.
template <int kLanes>
class LaneTeam {
 public:
  static __device__ int rank() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ int size() { return kLanes; }
  static __device__ unsigned mask() {
    return kAllLanes >> (kWarp - kLanes) << (threadIdx.x % kWarp / kLanes * kLanes);
  }

  template <typename V, typename Join>
  __device__ V join(V value, Join join) const {
    if constexpr (std::is_same_v<V, int32_t> && std::is_same_v<Join, Sum>) {
      return static_cast<int32_t>(__reduce_add_sync(mask(), static_cast<unsigned>(value)));
    } else if constexpr (kLanes == kWarp && kExtreme<Join> && std::is_floating_point_v<V>) {
      return value_of(extreme<Join>(order_key(value)));
    } else {
      for (int turn = kLanes / 2; turn > 0; turn /= 2) {
        value = join(value, __shfl_xor_sync(mask(), value, turn));
      }
      return value;
    }
  }
};
using WarpTeam = LaneTeam<kWarp>;

class BlockTeam {
 public:
  using Storage = uint64_t[kWarp];  // one value per warp

  explicit __device__ BlockTeam(Storage& storage) : storage_(storage) {}

  static __device__ int rank() { return static_cast<int>(threadIdx.x); }
  static __device__ int size() { return static_cast<int>(blockDim.x); }

  template <typename V, typename Join>
  __device__ V join(V value, Join join) const {
    static_assert(sizeof(V) <= sizeof(uint64_t));
    value = join_lanes(value, kWarp, join);
    V* values = reinterpret_cast<V*>(storage_);
    __syncthreads();  // all threads have read the storage in an earlier call
    if (rank() % kWarp == 0) values[rank() / kWarp] = value;
    __syncthreads();
    V joined = values[0];
#pragma unroll 8  // loads that do not wait for the join before them
    for (int warp = 1; warp < size() / kWarp; ++warp) joined = join(joined, values[warp]);
    return joined;
  }

 private:
  Storage& storage_;
};

// Reduces value(0), ..., value(n - 1) by `join`, whose neutral element is `first`.
template <typename Team, typename V, typename Join, typename Value>
__device__ V join_all(const Team& team, int64_t n, V first, Join join, Value&& value) {
  V joined = first;
  for (int64_t i = team.rank(); i < n; i += team.size()) joined = join(joined, value(i));
  return team.join(joined, join);
}

}  // namespace vmoe::cuda
