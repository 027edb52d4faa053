#include "../invert_slots.h"

#include "tensor.h"

namespace vmoe {
namespace {

std::tuple<Tensor, Tensor> invert_slots(const Tensor& token_, int64_t tokens) {
  check_dim("invert_slots", "token", token_, 3);
  check_dtype("invert_slots", "token", token_, ScalarType::Int);
  STD_TORCH_CHECK(tokens >= 0 && tokens < INT32_MAX, "invert_slots: num_tokens ", tokens);
  const int64_t G = token_.size(0), S = token_.size(1) * token_.size(2);
  STD_TORCH_CHECK(S <= INT32_MAX, "invert_slots: ", S, " slots a group do not fit int32");
  const Tensor token = packed(token_);
  Tensor offsets = empty({G, tokens + 1}, token);
  Tensor slots = empty({G, S}, token);
#ifdef VMOE_DEVICE_CUDA
  on_device("invert_slots", token, {}, [&](auto stream) {
    const Tensor scratch = workspace(token, cuda::invert_slots_workspace(G, S, tokens));
    cuda::invert_slots(
        read<int32_t>(token), write<int32_t>(offsets), write<int32_t>(slots), G, S, tokens,
        write<void>(scratch), stream);
  });
#else
  parallel(G, S + tokens, [&](int64_t begin, int64_t end) {
    cpu::invert_slots(
        read<int32_t>(token), write<int32_t>(offsets), write<int32_t>(slots), S, tokens, begin,
        end);
  });
#endif
  return {offsets, slots};
}

}  // namespace

VMOE_REGISTER(m) { m.impl("invert_slots", TORCH_BOX(&invert_slots)); }

}  // namespace vmoe
