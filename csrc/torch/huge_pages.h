// huge_pages -- new memory in large pages, where the system gives them when asked.
//
// Memory from the system comes a page at a time, on first touch: for 4 KiB pages that takes several
// times as long as writing them, and the C library hands a large tensor back to the system as soon
// as it is freed. Linux gives 2 MiB pages to who asks ("madvise", a common default) or to all.
// torch asks for all its CPU tensors where THP_MEM_ALLOC_ENABLE=1 is set; this is for our
// results, which are written in full, so that no memory is taken that was not asked for.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vmoe {

constexpr size_t kHugePage = size_t{2} << 20;

// The huge pages that lie within [data, data + bytes).
inline void ask_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  // An answer is not needed: a system that has none goes on with small ones.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace vmoe
