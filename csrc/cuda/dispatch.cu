#include "../common/slots.h"
#include "../dispatch.h"
#include "rows.h"

namespace vmoe::cuda {
namespace {

// Unit: the type that a lane copies at once. The size of Unit depends on the size and address of
// the rows.
template <typename Unit>
__global__ void __launch_bounds__(kRowThreads) dispatch_kernel(
    const Unit* __restrict__ x,         // [G, T, units]
    const int32_t* __restrict__ token,  // [G, E, C]
    Unit* __restrict__ out,             // [E, G, C, units]
    Slots shape, int64_t units) {
  const int64_t row = row_of_warp();
  if (row >= shape.all()) return;
  const SlotRow at = shape.at(row);
  const int32_t t = token[at.slot];
  Unit* to = out + row * units;
  if (t < 0 || t >= shape.tokens) {
    for (int64_t i = lane_of_warp(); i < units; i += kWarp) to[i] = Unit{};
    return;
  }
  const Unit* from = x + (at.group * shape.tokens + t) * units;
  constexpr int kAhead = 4;  // units that a lane loads before it stores the first
  for (int64_t first = lane_of_warp(); first < units; first += kAhead * kWarp) {
    Unit piece[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kWarp < units) piece[i] = from[first + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kWarp < units) to[first + i * kWarp] = piece[i];
    }
  }
}

}  // namespace

void dispatch(
    const char* x, const int32_t* token, char* out, const Slots& shape, int64_t row_bytes,
    CUstream_st* stream) {
  if (row_bytes == 0) return;
  const auto copy = [&](auto unit) {
    using Unit = decltype(unit);
    launch(
        dispatch_kernel<Unit>, blocks_of_rows(shape.all()), kRowThreads, 0, stream,
        reinterpret_cast<const Unit*>(x), token, reinterpret_cast<Unit*>(out), shape,
        row_bytes / static_cast<int64_t>(sizeof(Unit)));
  };
  const uintptr_t bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) |
                         static_cast<uintptr_t>(row_bytes);
  if (bits % 16 == 0) {
    copy(uint4{});
  } else if (bits % 4 == 0) {
    copy(uint32_t{});
  } else if (bits % 2 == 0) {
    copy(uint16_t{});
  } else {
    copy(char{});
  }
}

}  // namespace vmoe::cuda
