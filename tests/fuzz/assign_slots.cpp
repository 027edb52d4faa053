#include "assign_slots.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const Slots shape{in.integer(0, 3), in.integer(0, 60), in.integer(1, 40), in.integer(0, 9)};
  const int64_t K = in.integer(0, 4);
  Block<int32_t> expert = in.values<int32_t>(shape.all_tokens() * K);
  Block<T> priority = in.values<T>(shape.all_tokens());
  Block<int32_t> slot(shape.all_tokens() * K), source(shape.all());
  const T* order = in.flag() ? priority.data() : nullptr;
  kernels::assign_slots<T>(expert, order, slot, source, shape, K, 0, shape.G);
  for (const int32_t s : slot) expect(s >= -1 && s < shape.of_group());
  for (const int32_t request : source) expect(request >= -1 && request < shape.tokens * K);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
