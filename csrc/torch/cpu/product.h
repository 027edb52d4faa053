// product on a CPU -- loops over groups around products that each run on the calling thread
// (../../cpu/product.h): what one makes stays in that thread's cache for the next step.
#pragma once

#include "../../cpu/product.h"
#include "../tensor.h"

namespace vmoe {

// How many groups a thread takes at a time: small ones together, so that the calls do not
// outweigh the work, as far as their elements stay in its cache.
inline int64_t groups_together(int64_t elements_each) {
  return std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, elements_each));
}

// body(first, count) for every such run of groups. The runs are the same whatever the
// number of threads.
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
