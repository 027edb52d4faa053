// huge_pages -- asks Linux for 2 MiB pages for new memory.
//
// Linux allocates memory page by page, when a page is first touched. With pages of 4 KiB this
// allocation takes longer than the writes. Every large tensor has this cost again, because the C
// library returns the memory of a large tensor to the system when the tensor is freed. With the
// setting "madvise", a common default, Linux uses 2 MiB pages where a program asks for them.
//
// torch does the same for all its CPU tensors if THP_MEM_ALLOC_ENABLE=1 is set. This file asks for
// 2 MiB pages for the results of our ops. These results are written in full, so huge pages waste no
// memory.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vmoe {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages for the part of [data, data + bytes) that is made of whole huge pages.
inline void ask_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  // Errors are ignored: the memory then has small pages.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace vmoe
