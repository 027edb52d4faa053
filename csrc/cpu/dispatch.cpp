#include "../dispatch.h"

#include <cstring>

#include "../slot_row.h"

namespace vmoe::cpu::VMOE_ISA {

void dispatch(
    const char* x, const int32_t* token, char* out, int64_t G, int64_t tokens, int64_t E, int64_t C,
    int64_t row_bytes, int64_t row_begin, int64_t row_end) {
  if (row_bytes == 0) return;  // the pointers may be null
  for (int64_t row = row_begin; row < row_end; ++row) {
    const SlotRow at = slot_of_row(row, G, E, C);
    const int32_t t = token[at.slot];
    if (t >= 0 && t < tokens) {
      memcpy(out + row * row_bytes, x + (at.group * tokens + t) * row_bytes, row_bytes);
    } else {
      memset(out + row * row_bytes, 0, row_bytes);
    }
  }
}

}  // namespace vmoe::cpu::VMOE_ISA
