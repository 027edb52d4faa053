// parallel -- runs parts of a kernel on the threads of its caller.
//
// A kernel that divides one large group takes a parallel loop as an argument. A binding or a test
// passes the loop. The kernel divides the group into the same pieces for any number of threads. It
// adds up the results of the pieces in a fixed order. So the result of the kernel does not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vmoe {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, const void* context);

  // Calls body(begin, end, context) for ranges that partition [0, count). If `loop` is null,
  // operator() runs on the calling thread alone.
  void (*loop)(int64_t count, Body body, const void* context) = nullptr;

  // Calls f(begin, end) for ranges that partition [0, count) and begin at multiples of `grain`.
  // begin / grain is different for every range, so it can be the index of scratch memory.
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
