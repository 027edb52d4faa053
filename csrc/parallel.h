// parallel -- how a kernel uses threads that are not its own.
//
// A binding hands its parallel loop to the kernels that split one large group; tests hand
// theirs. A kernel cuts the work into the same pieces whoever runs them, and adds up what
// they give in one order: the result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace vmoe {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);

  // Calls body(begin, end, context) for ranges that make up [0, count), none of them
  // smaller than `grain` but the last. Null: one call, here.
  void (*loop)(int64_t count, int64_t grain, Body body, void* context) = nullptr;

  template <typename F>
  void operator()(int64_t count, int64_t grain, F&& f) const {
    if (!loop || count <= grain) {
      if (count > 0) f(int64_t{0}, count);
      return;
    }
    using Function = std::remove_reference_t<F>;
    const Body body = [](int64_t begin, int64_t end, void* context) {
      (*static_cast<Function*>(context))(begin, end);
    };
    loop(count, grain, body, &f);
  }
};

}  // namespace vmoe
