// team -- threads that work on one row or column together: lanes of a warp, or a block. A team
// reduces its threads' values in a fixed order, and every thread gets the result.
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

// Joins the values of `lanes` adjacent lanes, a power of two; the whole warp calls this together.
template <typename V, typename Join>
__device__ V join_lanes(V value, int lanes, Join join) {
  for (int turn = lanes / 2; turn > 0; turn /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, turn));
  }
  return value;
}

// kLanes adjacent lanes. Teams of the same warp need not call `join` together.
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
    __syncthreads();  // an earlier use of the storage is over
    if (rank() % kWarp == 0) values[rank() / kWarp] = value;
    __syncthreads();
    V joined = values[0];
    for (int warp = 1; warp < size() / kWarp; ++warp) joined = join(joined, values[warp]);
    return joined;
  }

 private:
  Storage& storage_;
};

// Joins value(0), ..., value(n - 1). `first` is the neutral value of `join`.
template <typename Team, typename V, typename Join, typename Value>
__device__ V join_all(const Team& team, int64_t n, V first, Join join, Value&& value) {
  V joined = first;
  for (int64_t i = team.rank(); i < n; i += team.size()) joined = join(joined, value(i));
  return team.join(joined, join);
}

}  // namespace vmoe::cuda
