#include "invert_slots.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const Slots shape{in.integer(0, 3), in.integer(0, 60), in.integer(0, 40), in.integer(0, 9)};
  Block<int32_t> token = in.values<int32_t>(shape.all());
  Block<int32_t> offsets(shape.G * (shape.tokens + 1)), slots(shape.all()),
      filled(shape.G * shape.E);
  kernels::invert_slots(token, offsets, slots, filled, shape, 0, shape.G);
  for (const int32_t offset : offsets) expect(offset >= 0 && offset <= shape.of_group());
  for (const int32_t slot : slots) expect(slot >= -1 && slot < shape.of_group());
  for (const int32_t count : filled) expect(count >= 0 && count <= shape.C);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
