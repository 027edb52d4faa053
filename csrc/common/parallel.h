// parallel -- how a kernel uses threads that are not its own.
//
// A binding hands its parallel loop to the kernels that split one large group; tests hand
// theirs. A kernel cuts the work into the same pieces whoever runs them, and adds up what
// they give in one order: the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vmoe {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, const void* context);

  // Calls body(begin, end, context) for ranges that make up [0, count). Null: no threads.
  void (*loop)(int64_t count, Body body, const void* context) = nullptr;

  // Calls f(begin, end) for ranges that make up [0, count) and begin at multiples of the
  // grain: begin / grain numbers them, for scratch of their own.
  template <typename F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    if (!loop || count <= grain) {
      if (count > 0) f(int64_t{0}, count);
      return;
    }
    const auto grains = [&](int64_t begin, int64_t end) {
      f(begin * grain, std::min(end * grain, count));
    };
    const Body body = [](int64_t begin, int64_t end, const void* context) {
      (*static_cast<decltype(&grains)>(context))(begin, end);
    };
    loop((count + grain - 1) / grain, body, &grains);
  }
};

}  // namespace vmoe
