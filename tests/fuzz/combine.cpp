#include "combine.h"

#include "input.h"

namespace vmoe {

// The lists are untrusted: any int32 values.
template <typename Row>
void combine(Input& in) {
  const Slots shape{in.integer(0, 3), in.integer(0, 30), in.integer(0, 10), in.integer(1, 9)};
  const int64_t D = in.integer(0, 70);
  Block<Row> y = in.values<Row>(shape.all() * D), grad = in.values<Row>(shape.all_tokens() * D);
  Block<Compute<Row>> gate = in.values<Compute<Row>>(shape.all());
  Block<int32_t> token = in.values<int32_t>(shape.all()), slots = in.values<int32_t>(shape.all());
  Block<int32_t> offsets = in.values<int32_t>(shape.G * (shape.tokens + 1));
  Block<Row> out(shape.all_tokens() * D), grad_y(shape.all() * D);
  Block<Compute<Row>> grad_gate(shape.all());
  const Compute<Row>* gates = in.flag() ? gate.data() : nullptr;
  kernels::combine<Row>(y, gates, offsets, slots, out, shape, D, 0, shape.all_tokens());
  kernels::combine_backward<Row>(grad, y, gate, token, grad_y, grad_gate, shape, D, 0, shape.all());
}

template <typename T>
void fuzz(Input& in, T) {
  const bool half = in.flag(), brain = in.flag();
  half ? brain ? combine<BFloat16>(in) : combine<Float16>(in) : combine<T>(in);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
