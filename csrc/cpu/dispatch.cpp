#include "../dispatch.h"

#include <cstring>

#include "stream.h"
#include "token_rows.h"

namespace vmoe::cpu::VMOE_ISA {

void dispatch(
    const char* x, const int32_t* token, char* out, const Slots& shape, int64_t row_bytes,
    int64_t row_begin, int64_t row_end) {
  if (row_bytes == 0) return;  // the pointers may be null
  const bool past_caches = streams(out, shape.all(), row_bytes);
  TokenRows<char> rows(x, token, shape, row_bytes, row_begin, row_end);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const char* from = rows.next().from;
    char* to = out + row * row_bytes;
    if (from == nullptr) {
      memset(to, 0, row_bytes);
    } else if (past_caches) {
      for (int64_t i = 0; i < row_bytes; i += kVectorBytes)
        stream(to + i, load((const int32_t*)(from + i)));
    } else {
      memcpy(to, from, row_bytes);
    }
  }
  if (past_caches) finish_streams();
}

}  // namespace vmoe::cpu::VMOE_ISA
