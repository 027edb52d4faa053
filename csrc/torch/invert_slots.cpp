#include "../invert_slots.h"

#include "tensor.h"

namespace vmoe {
namespace {

std::tuple<Tensor, Tensor, Tensor> invert_slots(const Tensor& token_, int64_t tokens) {
  check_dim("invert_slots", "token", token_, 3);
  check_dtype("invert_slots", "token", token_, ScalarType::Int);
  STD_TORCH_CHECK(
      tokens >= 0 && tokens < INT32_MAX, "invert_slots: num_tokens = ", tokens,
      ", wanted 0 to 2**31 - 2");
  const Slots shape{token_.size(0), tokens, token_.size(1), token_.size(2)};
  STD_TORCH_CHECK(
      shape.E <= INT32_MAX && shape.C <= INT32_MAX && shape.of_group() <= INT32_MAX,
      "invert_slots: ", shape.E, " times ", shape.C, " slots do not fit int32");
  const Tensor token = packed(token_);
  Tensor offsets = empty({shape.G, tokens + 1}, token);
  Tensor slots = empty({shape.G, shape.of_group()}, token);
  Tensor filled = empty({shape.G, shape.E}, token);
#ifdef VMOE_DEVICE_CUDA
  on_device("invert_slots", token, {}, [&](auto stream) {
    const Tensor scratch = workspace(token, cuda::invert_slots_workspace(shape));
    cuda::invert_slots(
        read<int32_t>(token), write<int32_t>(offsets), write<int32_t>(slots),
        write<int32_t>(filled), shape, write<void>(scratch), stream);
  });
#else
  parallel(shape.G, shape.of_group() + tokens, [&](int64_t begin, int64_t end) {
    cpu::invert_slots(
        read<int32_t>(token), write<int32_t>(offsets), write<int32_t>(slots),
        write<int32_t>(filled), shape, begin, end);
  });
#endif
  return {offsets, slots, filled};
}

}  // namespace

VMOE_REGISTER(m) { m.impl("invert_slots", TORCH_BOX(&invert_slots)); }

}  // namespace vmoe
