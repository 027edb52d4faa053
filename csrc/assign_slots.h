// assign_slots -- position of every request in its expert's buffer.
//
//   expert    [G, T, K]  int32            requested experts; outside [0, E): no request
//   priority  [G, T]     float32 | float64 or null
//                        tokens are served by descending priority (order.h); null: by index
//   slot      [G, T, K]  int32            e * C + position, or -1: dropped, or no request
//   source    [G, E, C]  int32            t * K + k of the request that a slot holds, or -1: empty
//
// Choice 0 of all tokens is served before choice 1 of any token (V-MoE, arXiv 2106.05974,
// algorithms 1 and 2). A request for an expert with a full buffer is dropped. The result is
// deterministic. The cost per group is O(T * K + E * C), plus a sort of T tokens if there are
// priorities.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/slots.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void assign_slots(
        const int32_t* expert,  // [G, T, K]
        const T* priority,      // [G, T] or null
        int32_t* slot,          // [G, T, K]
        int32_t* source,        // [G, E, C]
        const Slots& shape,
        int64_t K,
        int64_t group_begin,
        int64_t group_end);

)

VMOE_BY_ISA(assign_slots)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// The largest number of experts. The number is limited because the shared memory of a block holds
// the counters of all experts.
int64_t assign_slots_most_experts();

// Bytes of workspace that assign_slots needs.
template <typename T>
size_t assign_slots_workspace(bool prioritised, const Slots& shape, int64_t K);

template <typename T>
void assign_slots(
    const int32_t* expert,  // [G, T, K]
    const T* priority,      // [G, T] or null
    int32_t* slot,          // [G, T, K]
    int32_t* source,        // [G, E, C]
    const Slots& shape,
    int64_t K,
    void* workspace,  // assign_slots_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
