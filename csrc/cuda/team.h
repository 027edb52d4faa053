// team -- reductions over a team, the threads that compute one row or column: some lanes of a warp,
// or a block. A reduction has a fixed order, and every thread of the team gets its result.
#pragma once

#include <type_traits>

#include "../common/infinity.h"
#include "launch.h"

namespace vmoe::cuda {

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
// The maximum; NaN if either argument is NaN.
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

// Reduces the values of `lanes` adjacent lanes by `join`; `lanes` is a power of two. All lanes of
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
