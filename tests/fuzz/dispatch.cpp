#include "dispatch.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const Slots shape{in.integer(0, 3), in.integer(0, 30), in.integer(0, 10), in.integer(1, 9)};
  const int64_t row_bytes = in.integer(0, 255) * in.integer(1, 5);
  Block<char> x = in.values<char>(shape.all_tokens() * row_bytes);
  Block<int32_t> token = in.values<int32_t>(shape.all());
  Block<char> out(shape.all() * row_bytes);
  kernels::dispatch(x, token, out, shape, row_bytes, 0, shape.all());
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
