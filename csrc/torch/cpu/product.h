// product on a CPU -- parallel loops over groups. The products inside (../../cpu/product.h) run on
// the calling thread, so that their results stay in its cache for the next step.
#pragma once

#include "../../cpu/product.h"
#include "../tensor.h"

namespace vmoe {

// Number of groups that a thread computes at a time, at least 1. The groups together have up to
// 2^17 elements, which should stay in the cache of the thread. Several small groups share the cost
// of a call.
inline int64_t groups_together(int64_t elements_each) {
  return std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, elements_each));
}

// Calls body(first, count) for runs of groups_together groups, in parallel. The runs do not depend
// on the number of threads.
template <typename Body>
void parallel_runs(int64_t groups, int64_t elements_each, Body&& body) {
  const int64_t together = groups_together(elements_each);
  torch::stable::parallel_for(
      0, (groups + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
          const int64_t first = run * together;
          body(first, std::min(together, groups - first));
        }
      });
}

}  // namespace vmoe
